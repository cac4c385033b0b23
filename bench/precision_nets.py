"""A tracker's h0 under bfloat16 autocast, on transformers and convolutional nets.

    python bench/precision_nets.py [--nets GPT ...] [--out FILE]

h of a `CurvatureTracker` with its defaults after 40 steps, frozen θ, one batch, on the CPU, beside
h0 of the same θ and batch in float64 (`eigsh` with exact products). States: so many steps of AdamW
at 1e-3 before, in float32. "noise" is the rounding error of a gradient difference as the tracker
has measured it, over Δq·h. Nets of `transformers` and `timm` where these can be imported, with the
dropout off, at random initial weights; two that are built here in any case. Below: `LyapunovSGD`
at the paper's rate, on a smaller GPT.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lyapcuda
from ops import cpu_name

STEPS = 40
HEAD = (
    "| net | N | AdamW steps | h0 | float32: h/h0 | bfloat16: h/h0 | interval/h0 | noise | Δq/‖θ‖ "
    "| warned |"
)
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Net:
    """A net to measure: its model, what makes a batch of size n, its loss, states to measure at."""

    model: Callable[[], nn.Module]
    batches: Callable[[], Callable[[], Batch]]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    states: tuple[int, ...] = (0, 30, 150)


# --- data ----------------------------------------------------------------------------------------


def chains(vocabulary: int = 256, length: int = 64, n: int = 8) -> Callable[[], Batch]:
    """Texts of a random Markov chain, their own targets."""
    table = torch.softmax(3 * torch.randn(vocabulary, vocabulary), 1)

    def batch() -> Batch:
        x = [torch.randint(0, vocabulary, (n,))]
        for _ in range(length - 1):
            x.append(torch.multinomial(table[x[-1]], 1)[:, 0])
        return torch.stack(x, 1), torch.stack(x, 1)

    return batch


def first_words() -> Callable[[], Batch]:
    """Random texts in four classes, by the first word."""

    def batch() -> Batch:
        x = torch.randint(0, 200, (16, 32))
        return x, x[:, 0] % 4

    return batch


def blurred(size: int = 32, n: int = 16) -> Callable[[], Batch]:
    """Ten pictures with noise."""
    centers = torch.randn(10, 3, size, size)

    def batch() -> Batch:
        y = torch.randint(0, 10, (n,))
        return centers[y] + 2 * torch.randn(n, 3, size, size), y

    return batch


def classes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    out = getattr(out, "logits", out)
    return nn.functional.cross_entropy(out.to(torch.promote_types(out.dtype, torch.float32)), y)


def next_words(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    out = getattr(out, "logits", out)[:, :-1].flatten(0, 1)
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    return nn.functional.cross_entropy(out, y[:, 1:].flatten())


# --- nets ----------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Blocks of torch's own, over words or patches."""

    def __init__(self, width: int, layers: int, outputs: int, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.first = nn.Embedding(256, width) if causal else nn.Conv2d(3, width, 8, 8)
        self.places = nn.Parameter(torch.zeros(64 if causal else 16, width))
        one = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(one, layers, enable_nested_tensor=False)
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, outputs)
        for m in self.modules():
            if isinstance(m, nn.Linear | nn.Embedding):
                nn.init.normal_(m.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            x = self.blocks(self.first(x) + self.places, mask.to(self.places), is_causal=True)
        else:
            x = self.first(x).flatten(2).transpose(1, 2) + self.places
            x = self.blocks(x).mean(1)
        return self.last(self.norm(x))


def of_transformers() -> dict[str, Net]:
    import transformers as hf

    hf.utils.logging.set_verbosity_error()
    off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    small = dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)

    def gpt() -> nn.Module:
        ends = dict(bos_token_id=0, eos_token_id=0)
        shape = dict(vocab_size=256, n_positions=64, n_embd=128, n_layer=4, n_head=4)
        return hf.GPT2LMHeadModel(hf.GPT2Config(**shape, **dropout, **ends))

    def bert() -> nn.Module:
        shape = dict(vocab_size=200, max_position_embeddings=64, num_labels=4)
        return hf.BertForSequenceClassification(hf.BertConfig(**shape, **small, **off))

    def vit() -> nn.Module:
        shape = dict(image_size=32, patch_size=8, num_labels=10)
        return hf.ViTForImageClassification(hf.ViTConfig(**shape, **small, **off))

    return {
        "GPT-2 (transformers)": Net(gpt, chains, next_words),
        "BERT (transformers)": Net(bert, first_words, classes),
        "ViT (transformers)": Net(vit, blurred, classes),
    }


def of_timm() -> dict[str, Net]:
    import timm

    small = dict(img_size=32, patch_size=8, depth=4, embed_dim=96)
    names = {
        "vit_tiny_patch16_224": (32, small),
        "convnext_atto": (64, {}),
        "resnet10t": (64, {}),
        "mobilenetv2_035": (64, {}),
        "efficientnet_b0": (64, {}),
    }

    def net(name: str, size: int, options: dict) -> Net:
        make = lambda: timm.create_model(name, num_classes=10, **options)  # noqa: E731
        return Net(make, lambda: blurred(size), classes, (20,))

    return {f"{name} (timm)": net(name, *about) for name, about in names.items()}


def nets() -> dict[str, Net]:
    """All that can be built here, by name."""
    found = {
        "GPT": Net(lambda: Transformer(128, 3, 256, causal=True), chains, next_words),
        "ViT": Net(lambda: Transformer(96, 3, 10, causal=False), blurred, classes),
    }
    if importlib.util.find_spec("transformers"):
        found |= of_transformers()
    if importlib.util.find_spec("timm"):
        found |= of_timm()
    return found


# --- measurements --------------------------------------------------------------------------------


def tracked(
    model: nn.Module, closure: Callable[[], Tensor]
) -> tuple[lyapcuda.CurvatureTracker, bool]:
    """A tracker after `STEPS` steps, and whether it has warned."""
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            tracker.step(closure)
    return tracker, any("not known" in str(message.message) for message in heard)


def exact(model: nn.Module, closure: Callable[[nn.Module, torch.dtype], Tensor]) -> float:
    """h0 in float64."""
    twin = copy.deepcopy(model).double()
    with sdpa_kernel(SDPBackend.MATH):
        result = lyapcuda.eigsh(
            lambda: closure(twin, torch.float64), twin.parameters(), mode="exact", tol=1e-3
        )
    return float(result.eigenvalues[0])


def rows(name: str, net: Net) -> Iterator[str]:
    """Lines of the table."""
    for steps in net.states:
        torch.manual_seed(0)
        model, batch = net.model(), net.batches()
        for m in model.modules():
            if "Drop" in type(m).__name__:
                m.eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            net.loss(model, *batch()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()
        x, y = batch()

        def closure(m: nn.Module, dtype: torch.dtype, x: Tensor = x, y: Tensor = y) -> Tensor:
            return net.loss(m, x.to(dtype) if x.is_floating_point() else x, y)

        def bf16(m: nn.Module = model, closure: Callable = closure) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return closure(m, torch.float32)

        h0 = exact(model, closure)
        plain, _ = tracked(model, lambda m=model, c=closure: c(m, torch.float32))
        found, warned = tracked(model, bf16)
        low, high = (found.interval / h0).tolist()
        n = sum(p.numel() for p in model.parameters())
        norm = sum(float(p.detach().square().sum()) for p in model.parameters()) ** 0.5
        noise = found.sizing.noise / found.perturbation / abs(float(found.h))
        yield (
            f"| {name} | {n / 1e6:.2g}M | {steps} | {h0:.3g} | {float(plain.h) / h0:.3f} | "
            f"{float(found.h) / h0:.3f} | {low:.2f} to {high:.2f} | {noise:.0%} | "
            f"{found.perturbation / norm:.0e} | {'yes' if warned else 'no'} |"
        )


def descents(steps: int = 60) -> Iterator[str]:
    """Lines on what `LyapunovSGD` makes of a small GPT, a new batch every step."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model, batch, losses = Transformer(64, 3, 256, causal=True), chains(), []
        optimizer = lyapcuda.LyapunovSGD(model.parameters(), estimate="growth")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(steps):
                x, y = batch()

                def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):  # noqa: B023
                        return next_words(model, x, y)  # noqa: B023

                losses.append(float(optimizer.step(closure)))
        yield (
            f"LyapunovSGD, {dtype}: loss {losses[0]:.2f}, at most {max(losses):.2f}, mean of the "
            f"last five of {steps} steps {sum(losses[-5:]) / 5:.2f}, learning rate "
            f"{float(optimizer.lr):.2g}."
        )


def main() -> None:
    known = nets()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=known, default=list(known))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    title, *about = __doc__.splitlines()
    lines = [f"# {title[:-1]}", "", *about[3:], ""]
    lines += [f"Machine: {cpu_name()}, torch {torch.__version__}.", ""]
    lines += [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    for name in arguments.nets:
        for line in rows(name, known[name]):
            print(line, flush=True)
            lines.append(line)
            if arguments.out:
                arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    lines += ["", *(f"- {line}" for line in descents())]
    print(*lines[-2:], sep="\n")
    if arguments.out:
        arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
