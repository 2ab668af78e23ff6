"""FLOPs of the module that is run: by fvcore from a trace, and by torch's dispatcher during any forward pass.

Both count 2 x the multiply-accumulates of every op that multiplies matrices, and raise for one that they do not know.
fvcore counts multiply-accumulates; the factor 2 is applied here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.errors import BenchError
from bench.measure.closed_form import accumulate
from bench.measure.handles import DISPATCHED, TRACED, matmul_like
from bench.results import Flops

Key = TypeVar("Key", int, tuple[int, ...])


@dataclass(frozen=True)
class Parts:
    """Which submodules a model's FLOPs are put down to; whatever is left is the head.

    Attributes
    ----------
    encoder, decoder
        Modules that do not contain one another. Each must be called in every forward pass.
    overhead
        Pairs of a module and the modules inside it that are the backbone's own: the method's work is the difference.
    """

    encoder: tuple[nn.Module, ...]
    decoder: tuple[nn.Module, ...] = ()
    overhead: tuple[tuple[nn.Module, tuple[nn.Module, ...]], ...] = ()

    @property
    def modules(self) -> list[nn.Module]:
        """Every module that is asked for."""
        return [*self.encoder, *self.decoder, *(m for outer, inner in self.overhead for m in (outer, *inner))]

    def flops(self, total: int, inside: Callable[[nn.Module], int]) -> Flops:
        """Split ``total``, given the FLOPs ``inside`` any one module."""
        encoder, decoder = sum(map(inside, self.encoder)), sum(map(inside, self.decoder))
        overhead = sum(inside(outer) - sum(map(inside, inner)) for outer, inner in self.overhead)
        return Flops(encoder=encoder, decoder=decoder, head=total - encoder - decoder, overhead=overhead)


def count(model: nn.Module, inputs: Mapping[str, Tensor], parts: Parts) -> Flops:
    """Count one forward pass with fvcore.

    Work whose result nobody uses is counted too: it was done.

    Parameters
    ----------
    model
        Called as ``model(**inputs)``, in evaluation mode.
    inputs
        Tensors by name.
    parts
        Submodules of ``model``.

    Raises
    ------
    BenchError
        If the model cannot be traced, an op that multiplies is not known, or a part never ran.
    """
    from fvcore.nn import FlopCountAnalysis  # type: ignore[import-untyped]

    root = _Positional(model, tuple(inputs))
    analysis = FlopCountAnalysis(root, tuple(inputs.values())).clear_op_handles().set_op_handle(**TRACED)
    analysis.ancestor_mode("caller").tracer_warnings("none")
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    called: set[nn.Module] = set()
    try:
        with torch.no_grad(), ExitStack() as stack:
            for module in dict.fromkeys(parts.modules):
                stack.callback(module.register_forward_pre_hook(lambda module, _: called.add(module)).remove)
            by_module = analysis.by_module()
    except NotImplementedError as error:
        raise BenchError(f"FLOPs cannot be counted: {error}") from None
    except Exception as error:
        raise BenchError(
            f"{type(model).__name__} cannot be traced, so fvcore cannot count its FLOPs "
            f"({type(error).__name__}: {error}). Its forward pass must take and pass on tensors."
        ) from error
    for op in analysis.unsupported_ops():
        if matmul_like(op) or op.startswith(("prim::PythonOp", "prim::CallFunction")):
            inside = max((name for name in by_module if op in analysis.unsupported_ops(name)), key=len)
            raise _uncounted(op, type(model).__name__ + inside.removeprefix("model"))
    names = {module: name for name, module in root.named_modules()}
    _check_parts(parts, names, called)
    return parts.flops(2 * by_module[""], lambda module: 2 * int(by_module[names[module]]))


class Tally:
    """FLOPs of the forward passes inside a ``counting`` block."""

    def __init__(self, parts: Parts, counter: FlopCounterMode) -> None:
        self._parts, self._counter = parts, counter
        self._inside: dict[nn.Module, int] = {}

    def enter(self, module: nn.Module, _: Any) -> None:
        """Note that ``module`` starts (forward pre-hook)."""
        self._inside[module] = self._inside.get(module, 0) - self._counter.get_total_flops()

    def leave(self, module: nn.Module, _: Any, __: Any) -> None:
        """Note that ``module`` has run (forward hook)."""
        self._inside[module] += self._counter.get_total_flops()

    @property
    def flops(self) -> Flops:
        """What has been counted so far.

        Raises
        ------
        BenchError
            If a part never ran.
        """
        _check_parts(self._parts, self._parts.modules, self._inside)
        return self._parts.flops(self._counter.get_total_flops(), lambda module: self._inside.get(module, 0))


@contextmanager
def counting(parts: Parts) -> Iterator[Tally]:
    """Count every forward pass inside a ``with`` block with torch's dispatcher: no trace, the passes are real.

    Examples
    --------
    >>> with counting(parts) as tally:        # doctest: +SKIP
    ...     logits = model(**batch).logits
    >>> tally.flops.encoder                   # doctest: +SKIP

    Raises
    ------
    BenchError
        From within the block, if an op that multiplies is not known.
    """
    counter = FlopCounterMode(display=False, custom_mapping=DISPATCHED)
    tally = Tally(parts, counter)
    with ExitStack() as stack:
        for module in dict.fromkeys(parts.modules):
            stack.callback(module.register_forward_pre_hook(tally.enter).remove)
            stack.callback(module.register_forward_hook(tally.leave).remove)
        # The mode entered last acts first, so the watch sees what the counter could not break down further.
        stack.enter_context(_Watch(counter))
        stack.enter_context(counter)
        yield tally


def count_dispatched(model: nn.Module, inputs: Mapping[str, Tensor], parts: Parts) -> Flops:
    """Count one forward pass with torch's dispatcher: the figure of ``count``, many times faster.

    Raises
    ------
    BenchError
        If an op that multiplies is not known, or a part never ran.
    """
    with torch.no_grad(), counting(parts) as tally:
        model(**inputs)
    return tally.flops


def count_lengths(
    model: nn.Module,
    parts: Parts,
    make_inputs: Callable[[Key], Mapping[str, Tensor]],
    lengths: Mapping[Key, int],
) -> Flops:
    """Sum the FLOPs of examples whose cost depends on their length alone.

    Each length is counted once by the dispatcher, and the longest by fvcore as well: the two must agree.

    Parameters
    ----------
    model
        Called as ``model(**make_inputs(length))``, in evaluation mode.
    parts
        Submodules of ``model``.
    make_inputs
        Builds one example, unpadded, from its length (or lengths, as a tuple).
    lengths
        Length -> number of examples.

    Raises
    ------
    BenchError
        As ``count`` does, or if the two counters disagree.
    """
    counted = {length: count_dispatched(model, make_inputs(length), parts) for length in lengths}
    if counted:
        longest = max(counted)
        traced = count(model, make_inputs(longest), parts)
        if traced != counted[longest]:
            raise BenchError(
                f"the FLOPs of {type(model).__name__} at length {longest} are in doubt: fvcore counts {traced!r}, "
                f"torch {counted[longest]!r}. A module that varies from call to call cannot be counted by length."
            )
    return accumulate((counted[length], times) for length, times in lengths.items())


class _Positional(nn.Module):
    """Takes tensors by position and gives tensors back, as tracing wants."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with _KeepAlive() as kept:
            self.model(**dict(zip(self.names, tensors, strict=True)))
        return tuple(kept.witnesses)


class _KeepAlive(TorchFunctionMode):
    """Hangs a scalar on every product, because a trace drops ops whose result leads nowhere, however dear they were."""

    def __init__(self) -> None:
        super().__init__()
        self.witnesses: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if matmul_like(getattr(func, "__name__", "")):
            results = result if isinstance(result, tuple) else (result,)
            self.witnesses += [tensor.new_zeros(()) for tensor in results if isinstance(tensor, Tensor)]
        return result


class _Watch(TorchDispatchMode):
    """Raises for an op that multiplies and that ``counter`` has no formula for."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet not in self.counter.flop_registry and matmul_like(packet.__name__):
            raise _uncounted(str(packet), max(self.counter.mod_tracker.parents - {"Global"}, key=len))
        return func(*args, **(kwargs or {}))


def _uncounted(op: str, module: str) -> BenchError:
    return BenchError(
        f"{op} in module '{module}' multiplies, or may, and has no formula: add one to bench.measure.handles"
    )


def _check_parts(parts: Parts, present: Container[nn.Module], called: Container[nn.Module]) -> None:
    for module in parts.modules:
        if module not in present:
            raise BenchError(f"{type(module).__name__} is named as a part of the model, but is no submodule of it")
    for module in (*parts.encoder, *parts.decoder):
        if module not in called:
            raise BenchError(f"{type(module).__name__} is named as a part of the model, but was never called")
