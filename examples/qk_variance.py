"""Why attention divides by sqrt(d): the variance of q·k by head size, for random vectors and for a real model.

    python examples/qk_variance.py [MODEL] [--plot qk_variance.png]

If the d components of q and k are independent with mean 0 and variance 1, their dot product has the variance d. The
scores then have a standard deviation of sqrt(d), and softmax puts all weight on one token, with almost no gradient
(Vaswani et al., 2017, section 3.2.1). Dividing by sqrt(d) makes the variance 1 for every d. Are the q and k of a
trained model like that? Here they are captured in the running engine, as they are used in attention: after norms and
rotation.
"""

import argparse
from dataclasses import dataclass
from importlib.util import find_spec
from math import log
from pathlib import Path

import torch
from torch import Tensor

from nanoengine import LLM

TEXT = (
    "The sea was calm that morning. A fishing boat left the harbour before sunrise, and the two men on board hardly "
    "spoke. They knew where to go: beyond the lighthouse, where the water turns dark, there had been fish all week. "
    "By noon the clouds came in from the west, and the younger one began to count the waves between one gust and the "
    "next, as his grandfather had taught him."
)
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Layer:
    """q: [T, heads, d]. k: [T, KV heads, d]; each is used by heads / KV heads query heads."""

    q: Tensor
    k: Tensor

    def products(self) -> Tensor:
        """q·k without the division, [heads, T, T]."""
        k = self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], dim=1)
        return torch.einsum("qhd,khd->hqk", self.q, k)

    def sample(self, dims: Tensor) -> Tensor:
        """q·k over some of the d components, [heads, T, T]."""
        return Layer(self.q[..., dims], self.k[..., dims]).products()


def layers_of(llm: LLM) -> list[Layer]:
    names = [name for name, _ in llm.model.named_modules() if name.endswith(".attn")]
    [taps] = llm.tap(TEXT, names)
    return [Layer(taps[name].inputs[0].float(), taps[name].inputs[1].float()) for name in names]


def causal(scores: Tensor) -> Tensor:
    """The scores of the tokens that each query attends to, flat for each head: [heads, T (T + 1) / 2]."""
    rows, columns = torch.tril_indices(*scores.shape[-2:])
    return scores[:, rows, columns]


def variance(scores: Tensor) -> float:
    """The variance over queries and keys, mean of all heads."""
    return causal(scores).var(-1).mean().item()


def random_variance(size: int, samples: int = 20_000) -> float:
    generator = torch.Generator().manual_seed(size)
    q, k = (torch.randn(samples, size, generator=generator) for _ in range(2))
    return (q * k).sum(-1).var().item()


def growth(layers: list[Layer], sizes: list[int]) -> list[float]:
    """The variance of the products over `size` random components, mean of all layers."""
    order = torch.randperm(layers[0].q.shape[-1], generator=torch.Generator().manual_seed(0))
    return [sum(variance(layer.sample(order[:size])) for layer in layers) / len(layers) for size in sizes]


def attended(scores: Tensor) -> float:
    """The effective number of tokens that a query attends to: exp(entropy of softmax), for the last half."""
    length = scores.shape[-1]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)[:, length // 2 :]
    return torch.special.entr(weights).sum(-1).exp().mean().item()


def plot(path: str, sizes: list[int], grown: list[float], layers: list[Layer]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    left.loglog(SIZES, [random_variance(d) for d in SIZES], "o-", label="random q, k: q·k")
    left.loglog(SIZES, [random_variance(d) / d for d in SIZES], "o--", label="random q, k: q·k / sqrt(d)")
    left.loglog(sizes, grown, "s-", label="model: q·k over d of its components")
    left.loglog(sizes, [v / d for v, d in zip(grown, sizes, strict=True)], "s--", label="model: divided by sqrt(d)")
    left.set(xlabel="head size d", ylabel="variance", title="Variance of q·k by head size")
    left.legend(fontsize=8)
    size = layers[0].q.shape[-1]
    raw = [variance(layer.products()) for layer in layers]
    right.semilogy(raw, "s-", label="q·k")
    right.semilogy([v / size for v in raw], "s--", label=f"q·k / sqrt({size})")
    right.axhline(size, color="grey", lw=0.8, ls=":", label=f"independent, variance 1: {size}, and 1")
    right.axhline(1, color="grey", lw=0.8, ls=":")
    right.set(xlabel="layer", ylabel="variance, mean of the heads", title="The model's layers")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--plot", default="qk_variance.png", metavar="FILE")
    given = parser.parse_args(arguments)
    if find_spec("matplotlib") is None:  # check this before the work
        parser.error("the plot needs matplotlib: pip install 'nanoengine[plot]'")
    if not Path(given.plot).absolute().parent.is_dir():
        parser.error(f"--plot {given.plot}: there is no folder {Path(given.plot).absolute().parent}")
    with LLM(
        given.model, max_model_len=1024, fuse_kernels=False
    ) as llm:  # with fused kernels, q and k do not pass through the module
        layers = layers_of(llm)
    size = layers[0].q.shape[-1]
    sizes = sorted({d for d in SIZES if d < size} | {size})
    grown = growth(layers, sizes)
    print(f"{len(layers[0].q)} tokens, {len(layers)} layers, head size {size}\n")
    print(f"{'d':>5}{'random q·k':>14}{'/ sqrt(d)':>12}{'model q·k':>14}{'/ sqrt(d)':>12}")
    for d, model in zip(sizes, grown, strict=True):
        free = random_variance(d)
        print(f"{d:>5}{free:>14.2f}{free / d:>12.2f}{model:>14.2f}{model / d:>12.2f}")
    print(f"\nlog-log slope of the model: {slope(sizes, grown):.2f} (independent components: 1)")
    whole = [layer.products() for layer in layers]
    before = sum(map(attended, whole)) / len(whole)
    after = sum(attended(scores / size**0.5) for scores in whole) / len(whole)
    print(f"effective number of attended tokens: {before:.1f} without 1/sqrt(d), {after:.1f} with it")
    plot(given.plot, sizes, grown, layers)
    print(f"plot: {given.plot}")


def slope(sizes: list[int], values: list[float]) -> float:
    """The least-squares slope of log value by log size."""
    x = torch.tensor([log(d) for d in sizes])
    y = torch.tensor([log(v) for v in values])
    return (((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()).item()


if __name__ == "__main__":
    main()
