"""Post-training of policies that make images out of discrete tokens."""

from rlmm.installation import require_own_rooms

__version__ = "0.1.0"

require_own_rooms()
