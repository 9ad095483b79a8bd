"""Pixels to codes and back."""

from rlmm.codecs.base import QUANTIZERS, Codec, CodecOutput, PatchCodec, build_codec
from rlmm.codecs.files import (
    codec_hash,
    empty_codec,
    images_to_tensor,
    load_codec,
    load_settings,
    save_codec,
    tensor_to_images,
)
from rlmm.codecs.loss import codec_loss, reconstruction_metrics
from rlmm.codecs.networks import NetworkCodec

__all__ = [
    "QUANTIZERS",
    "Codec",
    "CodecOutput",
    "NetworkCodec",
    "PatchCodec",
    "build_codec",
    "codec_hash",
    "codec_loss",
    "empty_codec",
    "images_to_tensor",
    "load_codec",
    "load_settings",
    "reconstruction_metrics",
    "save_codec",
    "tensor_to_images",
]
