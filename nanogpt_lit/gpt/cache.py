"""Keys and values of the tokens already read, so that each new token costs one column of attention."""

from torch import Tensor


class LayerCache:
    """One layer's keys and values, (B, H, block_size, D) each, allocated once by the first append."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D) behind what is there; views of everything stored, (B, H, length, D).

        A prompt goes in whole into an empty cache, then single tokens follow: attention's causal mask is aligned to
        the first key, so several queries behind older keys would look at the wrong ones.
        """
        B, H, T, D = k.shape
        assert T == 1 or self.length == 0
        # Allocated here and not in the constructor: k already has the dtype and device that attention computes in,
        # which under autocast is not that of the parameters.
        if self.keys is None or self.values is None:
            self.keys = k.new_empty(B, H, self.block_size, D)
            self.values = v.new_empty(B, H, self.block_size, D)
        start, self.length = self.length, self.length + T
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class KeyValueCache:
    """A LayerCache per layer of a GPT: 2 * n_layer * B * block_size * n_embd numbers.

    It is written in place, so it serves inference only, under torch.no_grad.
    """

    def __init__(self, n_layer: int, block_size: int) -> None:
        self.layers = [LayerCache(block_size) for _ in range(n_layer)]

    @property
    def length(self) -> int:
        """Tokens read so far, which is also the position of the next one."""
        return self.layers[0].length

    def clear(self) -> None:
        """Forget the tokens, keep the memory."""
        for layer in self.layers:
            layer.length = 0
