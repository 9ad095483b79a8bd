"""A KV cache of fixed size: written in place, read as a view of what is filled, and widened from prompts to samples."""

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values [rows, heads, capacity, head size], of which the first `filled` positions count."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.filled = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, heads, _, size = key_states.shape
        self.keys = key_states.new_empty(rows, heads, self.capacity, size)
        self.values = value_states.new_empty(rows, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None, "the layer was initialised above"
        end = self.filled + key_states.shape[-2]
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def widened(self, rows: Tensor) -> "PreallocatedLayer":
        """A copy whose row i is this one's row `rows[i]`: a prompt's keys serve all its samples."""
        assert self.keys is not None and self.values is not None, "widen a prefilled layer"
        wide = PreallocatedLayer(self.capacity)
        wide.lazy_initialization(
            self.keys[:1].expand(len(rows), -1, -1, -1), self.values[:1].expand(len(rows), -1, -1, -1)
        )
        assert wide.keys is not None and wide.values is not None, "the layer was initialised above"
        wide.keys[:, :, : self.filled] = self.keys[rows, :, : self.filled]
        wide.values[:, :, : self.filled] = self.values[rows, :, : self.filled]
        wide.filled = self.filled
        return wide


def preallocated_cache(layers: int, capacity: int) -> Cache:
    """A cache of `layers` layers with room for `capacity` positions."""
    return Cache(layers=[PreallocatedLayer(capacity) for _ in range(layers)])


def widen(cache: Cache, rows: Tensor) -> Cache:
    """The cache with row i taken from row `rows[i]`."""
    return Cache(layers=[layer.widened(rows) for layer in cache.layers if isinstance(layer, PreallocatedLayer)])
