"""Which logged figures stand together in a plot, what the plot is called, and how to read it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """A plot to make where at least one of its keys was logged. The first key gives the figure named in
    words.
    """

    name: str
    title: str
    keys: tuple[str, ...]
    caption: str
    log: bool = False


HEALTH = (
    Panel(
        "mismatch",
        "Sampler and trainer agree",
        ("mismatch/mean", "mismatch/max"),
        "Difference, in nats, between the log-probability at which a token was sampled and the one the "
        "trainer gives it before the first update. It should stay at rounding error: growth means the two "
        "follow different laws.",
        log=True,
    ),
    Panel(
        "flat",
        "Flat groups",
        ("group/flat_share",),
        "Share of prompts whose samples all got the same reward, so nothing can be learned from them. Near"
        " 1 there is no signal left; a slow rise is normal as prompts are mastered.",
    ),
    Panel(
        "excluded",
        "Samples without a score",
        ("sample/unavailable_share", "sample/invalid_share"),
        "Unavailable: the judge failed, and the sample was left out. Invalid: the output could not be "
        "judged and got the configured penalty. Both should be near 0.",
    ),
    Panel(
        "canary",
        "Drift of the judges",
        ("canary/drift",),
        "Samples of the first rollout are scored again and again. The largest change of a score, in standard "
        "deviations of their first scores: a judge that does not change stays at 0.",
    ),
    Panel(
        "duplicates",
        "Repeats within a group",
        ("sample/duplicate_share", "guard/repeats"),
        "Share of samples that repeat an earlier one of their group, token by token or by looks. A jump points to "
        "collapse or to a seeding error.",
    ),
    Panel(
        "blank",
        "Blank pictures",
        ("guard/blank",),
        "Share of pictures of (nearly) one colour. A judge that fails on nothing, or a length penalty, can teach "
        "a policy to draw nothing.",
    ),
    Panel(
        "across",
        "One picture for many prompts",
        ("guard/across",),
        "Share of pairs of pictures of different prompts that look the same. Its square root is about the share of "
        "pictures that are one and the same.",
    ),
    Panel(
        "edges",
        "Edge density",
        ("guard/edges",),
        "Share of pixels at an edge. It falls when pictures go smooth or empty, and rises when noise or "
        "texture pleases the judge.",
    ),
    Panel(
        "colours",
        "Colour entropy",
        ("guard/colours",),
        "Entropy of the colours, in bits. It falls when the palette shrinks and rises with noise or oversaturation.",
    ),
    Panel(
        "diversity",
        "Diversity",
        ("diversity",),
        "Mean distance between two samples of one prompt: 0 when all are the same. A steady fall is the "
        "price of sharpening; a collapse is not.",
    ),
    Panel(
        "entropy",
        "Entropy",
        ("entropy",),
        "Mean entropy of the token distributions, in nats. It falls as the policy grows sure; once near 0,"
        " it no longer explores.",
    ),
    Panel(
        "kl",
        "Divergence",
        ("kl", "approx_kl"),
        "Estimated KL divergence in nats a token: kl from the policy the stage began with (where the objective holds "
        "to it), approx kl from the policy that drew the rollout.",
    ),
    Panel(
        "clip",
        "Clip fraction",
        ("clip_fraction", "clip_fraction_low", "clip_fraction_high"),
        "Share of tokens whose ratio was clipped, in all and at either bound. 0 with one update a rollout; above "
        "about 0.2, updates are too large or rollouts too old.",
    ),
    Panel(
        "ess",
        "Effective sample size",
        ("ess",),
        "How many samples' worth of information the importance weights leave, as a share. 1 is fully on-"
        "policy; a low value means a few samples dominate.",
    ),
    Panel(
        "grad",
        "Gradient norm",
        ("grad_norm",),
        "Length of the gradient before clipping. Spikes are worth a look; 0 means nothing is being learned.",
    ),
    Panel(
        "agreement",
        "Gradient agreement",
        ("gradient/agreement",),
        "Cosine of the gradients of the step's two halves. Near 0, a step is mostly noise: more prompts a step would "
        "help more than more steps.",
    ),
    Panel(
        "loss",
        "Loss",
        ("loss",),
        "The surrogate objective. Its level means little; it is here for completeness.",
    ),
    Panel("rate", "Learning rate", ("learning_rate",), "The schedule as it was applied."),
)

SFT = (
    Panel(
        "loss",
        "Loss",
        ("loss", "loss/image", "loss/text"),
        "Negative log-likelihood of the training targets, in nats a token. It should fall and then level off.",
    ),
    Panel("grad", "Gradient norm", ("grad_norm",), "Length of the gradient before clipping."),
    Panel("rate", "Learning rate", ("learning_rate",), "The schedule as it was applied."),
)

CODEC = (
    Panel("loss", "Loss", ("loss",), "Reconstruction loss of the image tokenizer. It should fall and level off."),
    Panel(
        "psnr",
        "Reconstruction quality",
        ("psnr_db",),
        "Peak signal-to-noise ratio of images encoded and decoded again, in dB. Every 6 dB halve the "
        "error; it bounds what any policy can draw.",
    ),
    Panel(
        "use",
        "Codebook use",
        ("codebook_use",),
        "Share of the codes that occur at all. A low share means a vocabulary larger than what is used.",
    ),
    Panel(
        "perplexity",
        "Codebook perplexity",
        ("codebook_perplexity",),
        "How many codes would be in use if all were equally frequent.",
    ),
)

DPO = (
    Panel(
        "loss",
        "Loss",
        ("loss", "loss/chosen"),
        "Loss of the preferences, and the negative log-likelihood of what was chosen where it counts. A sigmoid loss "
        "starts at log 2.",
    ),
    Panel(
        "correct",
        "Pairs in the right order",
        ("dpo/correct", "dpo/understanding/correct"),
        "Share of pairs of which the policy, against its reference, makes the chosen side likelier. Near 1 there is "
        "nothing left to learn from these pairs.",
    ),
    Panel(
        "margin",
        "Margin",
        ("dpo/margin", "dpo/understanding/margin"),
        "Mean implicit reward of the chosen side minus that of the rejected one: beta times the difference of their "
        "log-ratios to the reference.",
    ),
    Panel(
        "rewards",
        "Implicit rewards",
        ("dpo/chosen_reward", "dpo/rejected_reward", "dpo/reward"),
        "Beta times the log-ratio of either side. Where both fall, the policy leaves its reference for what is in no "
        "pair; an SFT term holds the chosen side up.",
    ),
    Panel(
        "bias",
        "Noise of the estimates",
        ("dpo/bias_bound",),
        "Of a masked policy: the most by which the noise of the estimated margins may bias the loss.",
    ),
    Panel("grad", "Gradient norm", ("grad_norm",), "Length of the gradient before clipping."),
    Panel("rate", "Learning rate", ("learning_rate",), "The schedule as it was applied."),
)

PAIRS = (
    Panel(
        "score",
        "Score of the samples",
        ("score/mean", "score/understanding/mean"),
        "Mean score of each batch of prompts. The pairs of a prompt are made of the spread around it.",
    ),
    Panel(
        "excluded",
        "Samples without a score",
        ("sample/unavailable_share",),
        "The judge failed, and the sample is in no pair.",
    ),
)

PANELS: Mapping[str, Sequence[Panel]] = {"codec": CODEC, "sft": SFT, "dpo": DPO, "pairs": PAIRS}
"""By a stage's kind; every other kind that logs one of HEALTH's keys gets HEALTH."""

LABELS: Mapping[str, str] = {
    "sample/duplicate_share": "same tokens",
    "guard/repeats": "same look",
    "guard/blank": "rollouts",
    "guard/across": "rollouts",
    "guard/edges": "rollouts",
    "guard/colours": "rollouts",
}
"""What a curve is called in a legend, where its key does not say it."""
