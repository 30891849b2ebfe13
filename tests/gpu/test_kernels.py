"""The kernels on a real GPU: against the plain references on fresh random inputs, and against themselves."""

from __future__ import annotations

import contextlib
import secrets
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import kernel_checks as checks
import pytest
import torch
from output_error import relative_error

from exl2ray.cuda import solver
from exl2ray.errors import NumericError
from exl2ray.formats.layout import GroupLayout
from exl2ray.model.blocks import check_states
from exl2ray.quality import PLAIN, Numerics
from exl2ray.quant.hessian import Factor, HessianAccumulator, prepare
from exl2ray.quant.pack import dequantize, pack
from exl2ray.quant.qparams import attention_options, mlp_options, parse
from exl2ray.quant.rows import Arrivals
from exl2ray.quant.solve import quantize_linears, solve_options

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.fixture
def seed(record_property: Callable[[str, int], None]) -> int:
    """Fresh for every run; shown when a test fails."""
    value = secrets.randbelow(1 << 30)
    record_property("seed", value)
    print(f"seed {value}")
    return value


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    from exl2ray.cuda.small_batches import CACHE

    CACHE.clear()
    CACHE.record_at, before = 2, CACHE.record_at
    yield
    CACHE.record_at = before
    CACHE.clear()


ROWS_32 = [GroupLayout((b,) * 8, (32,) * 8) for b in (2, 3, 4, 5, 6, 8)]
MIXED = [
    GroupLayout((6, 5, 5), (128, 128, 128)),
    GroupLayout((8, 4, 3), (128, 128, 128)),
    GroupLayout((3, 2, 2), (128, 128, 128)),
]


TALL = [(4,) * 2 + (3,) * 8, (5,) * 10, (8,) + (6,) * 9]
SHAPES = {
    "small groups": (256, [96, 32], ROWS_32),
    "tall groups": (384, [160, 96], MIXED),
    "several panels": (1184, [64, 96, 32], [GroupLayout(bits, (128,) * 9 + (32,)) for bits in TALL]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_solver_in_float32(shape: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of the plain loop, in another order."""
    monkeypatch.setattr(solver, "trailing_precision", contextlib.nullcontext)
    checks.check_feedback("cuda", *SHAPES[shape], seed)


@pytest.mark.parametrize("shape", SHAPES)
def test_solver_as_it_runs(shape: str, seed: int) -> None:
    """Trailing products in TF32."""
    checks.check_feedback("cuda", *SHAPES[shape], seed, share=0.97)


@pytest.mark.parametrize("shape", SHAPES)
def test_refined_scale_codes(shape: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "trailing_precision", contextlib.nullcontext)
    k, widths, layouts = SHAPES[shape]
    checks.check_refinement("cuda", k, widths[0], layouts, seed, share=0.97)


@pytest.mark.parametrize("shape", SHAPES)
def test_coordinate_descent(shape: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "trailing_precision", contextlib.nullcontext)
    k, widths, layouts = SHAPES[shape]
    checks.check_descent("cuda", k, widths[0], layouts, seed, share=0.97)


@pytest.mark.parametrize("shape", SHAPES)
def test_coordinate_descent_as_it_runs(shape: str, seed: int) -> None:
    """Trailing products in TF32."""
    k, widths, layouts = SHAPES[shape]
    checks.check_descent("cuda", k, widths[0], layouts, seed, share=0.9)


def test_refinement_and_descent_recorded_as_a_graph_gives_the_same_bytes(seed: int) -> None:
    layout = parse("0.1:4b_64g/0.9:3b_64g").layout(256)
    h, ws = checks.problem(256, [64], seed)
    rounds = [checks.solve("cuda", prepare(h), ws, [(0, layout)], numerics=Numerics(0.0, "feedback", 2))[0] for _ in range(3)]
    assert all(torch.equal(rounds[0].weight, r.weight) for r in rounds[1:])
    assert not torch.equal(rounds[0].weight, checks.solve("cuda", prepare(h), ws, [(0, layout)])[0].weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_round_to_nearest(bits: int, seed: int) -> None:
    checks.check_rounding("cuda", 224, 96, GroupLayout((bits, bits), (128, 96)), seed)


def test_very_small_weights() -> None:
    checks.check_small_weights("cuda")


def test_the_recorded_graph_gives_the_same_bytes_and_new_inputs_new_results(seed: int) -> None:
    """The first batch of a shape runs launch by launch, the second is recorded, the third is replayed."""
    layout = parse("1:4b_64g").layout(256)
    problems = [checks.problem(256, [64, 32], seed + i) for i in range(3)]
    factors = [prepare(h) for h, _ in problems]
    cases = [(0, layout), (1, layout), (1, layout)]
    rounds = [
        [checks.solve("cuda", f, ws, cases) for f, (_, ws) in zip(factors, problems, strict=True)] for _ in range(3)
    ]
    for other in rounds[1:]:
        for a, b in zip(rounds[0], other, strict=True):
            for x, y in zip(a, b, strict=True):
                assert torch.equal(x.weight, y.weight)
                assert torch.equal(x.scale_max, y.scale_max)
                assert x.codes is not None
                assert y.codes is not None
                assert torch.equal(x.codes, y.codes)
    found = zip(problems, factors, rounds[0], strict=True)
    checks.check_solutions([(s[0], checks.plain(f, ws[0], layout), h, ws[0]) for (h, ws), f, s in found], share=0.97)


def test_results_survive_later_batches_of_the_same_shape(seed: int) -> None:
    """Experts have equal shapes: what was solved for one must not be overwritten by the next."""
    options = {"w1": [parse("1:4b_64g"), parse("1:3b_64g")], "w3": [parse("1:5b_64g"), parse("1:2b_64g")]}
    experts, factors, kept = [], [], []
    for i in range(6):
        h, ws = checks.problem(128, [64, 64], seed + i)
        experts.append({"w1": ws[0], "w3": ws[1]})
        factors.append(prepare(h))
    for f, ws_ in zip(factors, experts, strict=True):
        assert f.r is not None
        placed = Factor(f.perm.cuda(), f.r.cuda(), f.damping, f.attempts)
        kept.append(solve_options(placed, {k: w.cuda() for k, w in ws_.items()}, options, budget_bytes=1))
    for f, ws_, solved in zip(factors, experts, kept, strict=True):
        for role, params in options.items():
            for option, found in zip(params, solved[role].values(), strict=True):
                expected = checks.plain(f, ws_[role], option.layout(128)).weight
                # Another shrink factor, nearly as good, changes all weights of a group a little; an overwritten result is far
                # from what was expected.
                away = torch.linalg.norm(found.weight.cpu().float() - expected.float())
                assert away < 0.3 * torch.linalg.norm(expected.float())


@pytest.mark.parametrize("table", ["attention", "mlp"])
def test_all_options_of_a_table(table: str, seed: int) -> None:
    """As a measurement runs them: the layer's error is that of the plain loop, as a rule within 0.1 %."""
    rows = attention_options() if table == "attention" else mlp_options()
    k = 512
    h, (w,) = checks.problem(k, [256], seed)
    factor = prepare(h)
    assert factor.r is not None
    placed = Factor(factor.perm.cuda(), factor.r.cuda(), factor.damping, factor.attempts)
    options = list(dict.fromkeys(row[-1] for row in rows))
    found = solve_options(placed, {"w": w.cuda()}, {"w": options})["w"]
    ratios = {}
    for option, solved in zip(options, found.values(), strict=True):
        expected = checks.plain(factor, w, option.layout(k)).weight
        ours, theirs = (relative_error(h, w, x) for x in (solved.weight.cpu(), expected))
        ratios[option.desc] = abs(ours / theirs - 1)
    assert statistics.median(ratios.values()) < 1e-3, ratios
    assert max(ratios.values()) < 0.01, ratios


def test_quantise_pack_and_decode(seed: int) -> None:
    h, ws = checks.problem(256, [96, 64], seed)
    factor = prepare(h.cuda())
    layouts = {"a": parse("0.1:4b_64g/0.9:3b_64g").layout(256), "b": parse("1:6b_128g").layout(256)}
    weights = {"a": ws[0].cuda(), "b": ws[1].cuda()}
    for key, q in quantize_linears(factor, weights, layouts).items():
        packed = pack(key, q)
        assert torch.equal(dequantize(packed, "cuda"), q.weight)
        assert torch.equal(dequantize(packed, "cpu"), q.weight.cpu())


def test_hessian_of_half_inputs(seed: int) -> None:
    x = torch.randn(4000, 384, generator=torch.Generator().manual_seed(seed)).half()
    accumulator = HessianAccumulator(384, "cuda")
    for part in x.split(700):
        accumulator.add(part.cuda())
    exact = x.double().T @ x.double() / accumulator.rows
    assert torch.allclose(accumulator.finish().cpu().double(), exact, rtol=1e-5, atol=1e-5 * float(exact.max()))


@pytest.mark.parametrize("k", [2048, 4096, 5000])
def test_wide_hessian_of_half_inputs(k: int, seed: int) -> None:
    x = torch.randn(3000, k, generator=torch.Generator().manual_seed(seed)).half().cuda()
    accumulator = HessianAccumulator(k, "cuda")
    for part in x.split(1100):
        accumulator.add(part)
    exact = (x.double().T @ x.double()).float()
    assert torch.allclose(accumulator.h, exact, rtol=1e-5, atol=1e-5 * float(exact.max()))


def test_prepare_on_the_gpu_agrees_with_the_cpu(seed: int) -> None:
    h, _ = checks.problem(512, [32], seed)
    cpu, gpu = prepare(h), prepare(h.cuda())
    assert torch.equal(cpu.perm, gpu.perm.cpu())
    assert cpu.r is not None
    assert gpu.r is not None
    assert torch.allclose(cpu.r, gpu.r.cpu(), rtol=1e-3, atol=1e-5 * float(cpu.r.max()))


@pytest.mark.parametrize("n", [32, 160, 1056])
def test_packing(n: int, seed: int) -> None:
    layout = GroupLayout((8, 6, 6, 5, 4, 4, 3, 2), (32, 64, 96, 32, 128, 32, 64, 128))
    checks.check_packing("cuda", layout, n, seed)


@pytest.mark.parametrize(("rotated", "neox"), [(8, True), (4, True), (8, False), (4, False)])
def test_rotate(rotated: int, neox: bool) -> None:
    checks.check_rotate("cuda", rotated, neox)


@pytest.mark.parametrize("columns", [8, 64, 256, 5000])
def test_gated_silu(columns: int) -> None:
    checks.check_gated("cuda", columns)


@pytest.mark.parametrize(("tokens", "hidden"), [(5, 32), (40, 96), (300, 1024)])
def test_residual_errors(tokens: int, hidden: int) -> None:
    checks.check_residual_errors("cuda", tokens, hidden)


@pytest.mark.parametrize(("tokens", "hidden"), [(5, 32), (300, 4096)])
def test_distances(tokens: int, hidden: int) -> None:
    checks.check_distances("cuda", tokens, hidden)


@pytest.mark.parametrize("hidden", [96, 4096, 5120])
def test_rms_norm(hidden: int) -> None:
    checks.check_rms_norm("cuda", hidden)


@pytest.mark.parametrize("elements", [70, 256, 100_003])
def test_plus_behind(elements: int) -> None:
    checks.check_plus_behind("cuda", elements)


def test_launches_go_around_numba() -> None:
    """The prepared launch is used, does what Numba's own does, and does nothing for tensors without elements."""
    from exl2ray.cuda import elementwise, elementwise_kernels
    from exl2ray.cuda.launch import Launch, stream_of

    x = torch.randn(3, 1000, device="cuda").half()
    direct, ordinary = torch.empty_like(x), torch.empty_like(x)
    for out, through_numba in ((direct, False), (ordinary, True)):
        call = Launch(elementwise_kernels.gated_silu, 3, elementwise_kernels.THREADS, x.view(-1), x.view(-1), out.view(-1))
        assert call._function, "this version of numba-cuda hides the handles of kernels"
        call._call_numba(stream_of(x), ()) if through_numba else call(stream_of(x))
    assert torch.equal(direct, ordinary)
    assert elementwise.gated_silu(x[:0], x[:0]).shape == (0, 1000)


def test_launches_with_parameters_filled_in_again(seed: int) -> None:
    """Of other sizes, other tensors, from several threads on streams of their own: what the plain form gives."""
    from exl2ray.cuda import elementwise
    from exl2ray.cuda.launch import _made

    def run(n: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            generator = torch.Generator("cuda").manual_seed(seed + n)
            for size in (n, 5 * n + 1, 1, 64 * n):
                gate, up = (torch.randn(size, device="cuda", generator=generator).half() for _ in range(2))
                found = elementwise.gated_silu(gate, up)
                expected = torch.nn.functional.silu(gate.float()).half().float() * up.float()
                torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=1e-3)
            torch.cuda.current_stream().synchronize()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(100, 140)))
    run(77)
    assert all(not launch._args for launch in _made.launches.values())


def test_batches_on_a_gpu_are_checked_at_the_end() -> None:
    out, arrivals = torch.zeros(4, 10, 32, dtype=torch.float16, device="cuda"), Arrivals(check_states)
    batch = torch.ones(2, 10, 32, dtype=torch.float16, device="cuda")
    arrivals.put(out, slice(0, 2), batch, "first")
    batch = batch.clone()
    batch[1, 3, 4] = -torch.inf
    arrivals.put(out, slice(2, 4), batch, "second")
    arrivals.end()
    assert out[3, 3, 4] == -65504
    assert bool((out[:2] == 1).all())
    batch[0, 0, 0] = torch.nan
    arrivals.put(out, slice(0, 2), batch, "third")
    with pytest.raises(NumericError, match="third"):
        arrivals.end()


def test_linears_side_by_side_have_the_same_bytes(seed: int) -> None:
    """Launched one by one at first, then as recordings that run at the same time: those must share no workspace."""
    h, ws = checks.problem(256, [96, 64, 128], seed)
    factor = prepare(h.cuda())
    weights = {str(i): w.cuda() for i, w in enumerate(ws)}
    layouts = {key: GroupLayout((4,) * (256 // n), (n,) * (256 // n)) for key, n in (("0", 128), ("1", 64), ("2", 32))}
    numerics = Numerics(0.0, "feedback", 2)
    apart = quantize_linears(factor, weights, layouts, numerics=numerics)
    for attempt in range(40):
        together = quantize_linears(factor, weights, layouts, numerics=numerics, side_by_side=True)
        for key, q in apart.items():
            assert torch.equal(q.weight, together[key].weight), (attempt, key)
            assert torch.equal(q.codes, together[key].codes), (attempt, key)


@pytest.mark.parametrize("numerics", [PLAIN, Numerics(0.5, "feedback", 2)])
def test_warming_up_compiles_every_kernel(numerics: Numerics) -> None:
    """With the types that the work itself has: nothing is compiled or loaded afterwards."""
    from exl2ray.cuda import launch
    from exl2ray.quant.warm import warm_up

    warm_up(torch.device("cuda"), numerics)
    loaded = launch._function.cache_info().misses
    layout = GroupLayout((5, 3), (128, 64))
    weight = torch.randn(192, 96, device="cuda").half()
    factor = prepare(torch.eye(192, device="cuda"))
    solved = quantize_linears(factor, {"x": weight}, {"x": layout}, numerics=numerics)
    dequantize(pack("x", solved["x"]), "cuda")
    solve_options(factor, {"q_proj": weight}, {"q_proj": attention_options()[0][:1]})
    assert launch._function.cache_info().misses == loaded
