"""The judgement: from the kind of an array and what is wanted to the steps that get there. Pure: imports no framework.

    decide(traits, want, here)  ->  Decision(steps, refusal)

A plan is: steps on the giving side, at most one SHARE, steps on the receiving side. Here is the order in which the
rules are asked, which is the order of the steps; `_rules` has each of them, `_refuse` what is never converted.
"""

from __future__ import annotations

from tensorbridge import _dtypes, _engine, _refuse, _roads, _rules
from tensorbridge._array import CPU, Device, Traits
from tensorbridge._errors import CopyRequiredError
from tensorbridge._step import HERE, Decision, Here, Op, Refusal, Want, cure_of


def decide(traits: Traits, want: Want, here: Here = HERE) -> Decision:
    """The steps from an array of this kind to what is wanted, or why there are none."""
    refusal = _refuse.before(traits, want, here)
    if refusal is not None:
        return Decision((), refusal)
    steps = _steps(traits, want, here)
    _rules.order_back(steps)
    if here.worker:
        befores = [traits, *(step.after for step in steps)]
        steps[:] = map(_engine.in_pieces, steps, befores)
    refusal = _refuse.after(traits, steps, here)
    if refusal is None and want.copy is False:
        moving = [step for step in steps if step.kind]
        if moving:
            refusal = Refusal(CopyRequiredError, "", cure_of(moving))
    return Decision(tuple(steps), refusal)


def _steps(traits: Traits, want: Want, here: Here) -> _rules.Steps:
    steps = _rules.Steps(traits)
    where = _rules.target_device(traits, want)
    receiver = want.framework
    _rules.make_array(steps, want, here)

    # -- Giving side: out of the graph, native elements, real values, off the device.
    guarded = steps.now.graph and receiver != "torch"
    wanted = want.dtype or steps.now.dtype.lstrip(">")
    _rules.leave_graph(steps, want, wanted)
    if steps.now.framework == "cupy" and receiver != traits.framework and _refuse.askew(steps.now):
        steps.then(Op.PACK, "a kernel faults at an address that is no multiple of the item size: packed byte by byte")
    source = steps.now.dtype.lstrip(">")
    crossing = where != steps.now.device
    copied = crossing or want.copy or source != wanted or want.out is not None
    if copied and "neg" in steps.now.lazy and steps.now.device.is_other:
        _rules.resolve(steps)  # Apple's copies do not see that mark
    if want.out is not None:
        return _into_out(steps, want.out, want, here, where)
    _rules.make_native(steps, want, here, wanted, crossing)
    late_cast = steps.now.dtype.lstrip(">") != wanted
    if steps.now.lazy and receiver != "torch":  # a cast has resolved it already
        _rules.resolve(steps)
    if _rules.leaves(steps.now, where):
        _rules.to_host(steps, want, pinned=want.pin_memory and not late_cast)
    pins = want.pin_memory and (steps.now.pinned is not True or (bool(want.copy) and not steps.fresh) or late_cast)

    # -- A layout that the receiver can hold; a promise that it can keep.
    if receiver == "torch" != steps.now.framework and not _rules.is_alias(steps.now, receiver):
        _rules.make_holdable(steps)
    if not (steps.fresh or late_cast or pins or where != steps.now.device):  # else the memory is fresh in the end
        _rules.keep_promises(steps, want, here, guarded, traits.framework)

    # -- The crossing, and what the receiving side does.
    pinned = steps.now.pinned is True
    if steps.now.framework == "torch" and receiver == "cupy" and steps.now.device == CPU:
        _rules.share_on_host(steps)
    elif not (steps.now.framework == "numpy" and receiver == "cupy"):  # there the upload is the crossing
        _rules.share(steps, receiver, here)
    if where != steps.now.device:
        if late_cast and receiver == "torch" and _rules.narrows(steps.now, wanted):
            _rules.cast_late(steps, wanted, source, here, bus="before")
            late_cast = False
        _rules.to_device(steps, receiver, where, pinned, f"keep it on {traits.device}")
    if late_cast:
        _rules.cast_late(steps, wanted, source, here, bus="after" if crossing else "")
    if pins:
        steps.then(Op.PIN, "pin_memory=True", pinned=True, cure="leave pin_memory out")
    if receiver == "numpy":
        _rules.protect(steps, want, guarded)
    return steps


def _into_out(steps: _rules.Steps, out: Traits, want: Want, here: Here, where: Device) -> _rules.Steps:
    """Every element is written into `out`, once where one copy can do it; casts happen on the way."""
    then, receiver = steps.then, want.framework
    name = steps.now.dtype.lstrip(">")
    marked = steps.now.lazy not in ("", "zero")
    if ("neg" in steps.now.lazy and name != out.dtype) or (marked and where != steps.now.device):
        _rules.resolve(steps)  # Tensor.copy_ loses a mark where it casts, and applies it twice across CUDA's bus
    if "neg" in out.lazy and name != out.dtype and _dtypes.can_cast(steps.now.framework, name, out.dtype):
        _rules.copy(steps, Op.CAST, "torch cannot cast into a negative view", here, dtype=out.dtype)
    # Apple's copy lacks dtypes, and takes gaps of the same strides on both sides for one block (pytorch#189961).
    plainly = name == out.dtype and steps.now.spacing == "dense"
    if _rules.leaves(steps.now, where) and (where != CPU or (steps.now.device.is_other and not plainly)):
        _rules.to_host(steps, want)
    if steps.now.framework == "cupy" and receiver == "numpy":
        plain = steps.now.dtype == out.dtype and steps.now.order == out.order and out.spacing == "dense"
        if steps.now.spacing != "dense":
            then(Op.PACK, "packed on the device, so that one block crosses the bus")
        if not plain:
            then(Op.TO_HOST, f"{steps.now.device} to the host", framework="numpy", device=CPU)
    if receiver == "cupy" and steps.now.device == CPU:
        if steps.now.framework == "torch":
            _rules.make_fillable(steps, "numpy", out)
            _rules.share_on_host(steps)
        if steps.now.dtype.startswith(">"):
            then(Op.BYTESWAP, "cupy has native byte order only", dtype=steps.now.dtype[1:])
        _rules.make_fillable(steps, "cupy", out)
        _rules.to_device(steps, "cupy", where, pinned=False)
    if steps.now.device != CPU and {steps.now.framework, receiver} == {"torch", "cupy"}:
        _rules.make_fillable(steps, receiver, out)
        if receiver == "torch" and not (steps.now.spacing in ("dense", "strided") and steps.now.aligned):
            then(Op.PACK, "torch strides are forward and whole elements")
        _rules.order(steps, receiver, here)
        then(Op.SHARE, _rules.share_why(steps.now.framework, receiver), framework=receiver, origin="", writable=True)
    if steps.now.framework == "torch" and receiver == "numpy" and not _rules.torch_holds(out):
        _rules.make_fillable(steps, "numpy", out)
        if steps.now.device != CPU:
            then(Op.TO_HOST, f"{steps.now.device} to the host", device=CPU)
        _rules.share_on_host(steps)
    held = steps.now.framework != "numpy" or _rules.torch_holds(steps.now)
    if receiver == "torch" and not held and not _rules.numpy_fills(steps.now, out):
        _rules.make_fillable(steps, "torch", out)
        if steps.now.dtype.startswith(">"):
            then(Op.BYTESWAP, "torch has native byte order only", dtype=steps.now.dtype[1:])
        _rules.make_holdable(steps)
    choice = _rules.filling(steps.now, out, receiver, here)
    joins = ", which joins the autograd graph{grad_fn}, as with copy_" if steps.now.graph else ""
    then(
        Op.FILL, f"into the caller's array, `out`{joins}{_roads.into(steps.now, out)}{choice.said}", by=choice.by,
        framework=receiver, device=out.device, dtype=out.dtype, pinned=out.pinned,
        **{field: getattr(out, field) for field in _rules.OF_OUT},
    )  # fmt: skip
    _rules.protect(steps, want, guarded=False)
    return steps
