"""The planner: its predictions against the published tables, its common sense, its command."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import calibrate, fitting
from benchmarks.published import Row, excluded, rows
from common.registry.forks import Size, forks, model_names
from common.registry.layout import RULE, Layout, layouts_of
from common.run import degrees
from common.run.options import options
from planner import choose_layout, get_model, get_profile, machine, plan, predict
from planner.cli import command
from planner.hardware import names
from planner.layouts import enough, refusal
from planner.machine import recognise
from planner.model import KINDS, spread
from tests.helpers.planning import ask
from tools.docs import tables


def fitted_rows() -> list[Row]:
    return [row for row in rows() if row.id not in excluded()]


def predicted(row: Row) -> float:
    name = row.group + ("-fsdp" if row.other.get("fsdp") and row.group == "mochi-l40-stage" else "")
    profile = get_profile(name)
    if row.group == "mochi-l40-stage" and row.other.get("fsdp"):
        profile = get_profile("mochi-l40-stage-fsdp")
    found = predict(row.model, row.size, row.layout, profile, "reference")
    return {"step": found.step, "sampling": found.sampling, "total": found.total}[row.kind]


def errors() -> list[calibrate.Errors]:
    return [calibrate.Errors(row, predicted(row) / row.seconds - 1) for row in fitted_rows()]


def test_every_published_group_has_a_profile_that_reproduces_it() -> None:
    groups: dict[tuple[str, str], list[float]] = {}
    for error in errors():
        groups.setdefault((error.row.group, error.row.model.name), []).append(abs(error.fitted))
    assert {row.group for row in rows()} <= set(names()[1])
    assert {g: sum(v) / len(v) for g, v in groups.items() if sum(v) / len(v) > 0.04} == {}


def test_the_faster_of_two_layouts_is_named_and_the_choice_is_no_worse_than_the_rule() -> None:
    found = errors()
    right, rule, total = calibrate.pairs_in_order(found, lambda e: e.fitted)
    assert total > 60 and right >= 0.9 * total and right >= rule
    picked = calibrate.choices(found, lambda e: e.fitted)
    assert max(c.planner_loss for c in picked) <= 0.05
    assert sum(c.planner_loss for c in picked) <= sum(c.rule_loss for c in picked)
    assert sum(c.planner_loss == 0 for c in picked) >= sum(c.rule_loss == 0 for c in picked)


def test_excluded_rows_exist_and_have_reasons() -> None:
    known = {row.id for row in rows()}
    assert excluded().keys() <= known
    assert all(len(reason) > 40 for reason in excluded().values())
    assert len(excluded()) < 0.1 * len(known)


def test_constants_are_few() -> None:
    observations = [o for row in fitted_rows() for o in fitting.observe(row)]
    of_a_gpu = [key for o in observations for key in o.keys.values() if key[1] == "h20"]
    assert len(set(of_a_gpu)) <= 10


def test_a_fit_finds_the_constants_that_made_the_rows() -> None:
    """Rows made by the model itself: their constants come back, and leaving a row out changes little."""
    table = [row for row in fitted_rows() if row.group == "cogvideox-5b-l40"]
    observations = [o for row in table for o in fitting.observe(row)]
    truth = {key: fitting.prior(key)[0] for o in observations for key in o.keys.values()}
    truth |= {("gbs", "l40"): 11.0, ("attention", "l40"): 0.8}
    made = [replace(o, seconds=o.predict(truth), sigma=0.001) for o in observations]
    problem = fitting.Problem(made)
    fit = problem.solve()
    assert max(abs(o.predict(fit.theta) / o.seconds - 1) for o in made) < 0.005
    import numpy as np

    jacobian = problem.jacobian(np.array([fit.x[key] for key in problem.keys]))
    without = problem.without(fit, jacobian, [3])
    assert made[3].predict(without) == pytest.approx(made[3].seconds, rel=0.02)


def test_a_users_measurements_make_a_profile(tmp_path: Path) -> None:
    """Results as run.py writes them, made by a machine with other links than the one we start from."""
    truth = get_profile("l40", "9")
    size = get_model("mochi").default_size
    made = []
    for layout in (
        Layout(),
        Layout(2, 1, 1),
        Layout(1, 2, 1),
        Layout(1, 1, 2),
        Layout(2, 2, 1),
        Layout(2, 1, 2),
    ):
        found = predict(get_model("mochi"), size, layout, truth, "ours")
        key = {**vars(layout), **vars(size), "model": "mochi", "program": "ours"}
        made.append({"key": key, "stages_s": {"sampling": found.sampling, "decode": found.decode}})
    results, output = tmp_path / "results.json", tmp_path / "mine.json"
    results.write_text(json.dumps({"rows": [*made, {"key": made[0]["key"], "error": "x"}]}))
    arguments = ["--measured", str(results), "--gpu", "l40", "--output", str(output)]
    done = CliRunner().invoke(calibrate.main, arguments)
    assert done.exit_code == 0, done.output
    mine = get_profile(str(output))
    assert mine.links.gbs == pytest.approx(9, rel=0.15)
    best = plan(get_model("mochi"), size, 4, mine).best
    assert best.total == pytest.approx(plan(get_model("mochi"), size, 4, truth).best.total, rel=0.03)
    results.write_text("[]")
    assert CliRunner().invoke(calibrate.main, arguments).exit_code == 2


@pytest.mark.parametrize("name", model_names())
def test_more_of_anything_is_never_slower(name: str) -> None:
    model = get_model(name)
    size, slow = model.default_size, get_profile("l40")
    faster = [
        replace(slow, tflops=2 * slow.tflops),
        replace(slow, hbm_gbs=2 * slow.hbm_gbs),
        replace(slow, links=replace(slow.links, gbs=2 * slow.links.gbs)),
        replace(slow, links=replace(slow.links, node_gbs=2 * slow.links.node_gbs)),
        replace(slow, links=replace(slow.links, across=1.0)),
    ]
    for layout in [*layouts_of(6), Layout(2, 2, 4), Layout(1, 8, 2)]:
        for scheme in ("ours", "reference"):
            before = predict(model, size, layout, slow, scheme)
            for profile in faster:
                assert predict(model, size, layout, profile, scheme).total <= before.total, (layout, profile)
            longer = predict(model, replace(size, num_steps=size.num_steps + 1), layout, slow, scheme)
            assert longer.total > before.total


def test_the_parts_are_the_whole() -> None:
    model = get_model("consisid")
    for layout in (Layout(), Layout(2, 3, 1), Layout(1, 2, 4)):
        for scheme in ("ours", "reference"):
            found = predict(model, model.default_size, layout, get_profile("h100"), scheme)
            assert sum(found.parts.values()) == pytest.approx(found.total)
            assert set(found.parts) == set(KINDS) and found.bound in KINDS


def test_our_scheme_is_predicted_faster_than_the_published_one() -> None:
    """Where the reference replicates text or decodes on every rank."""
    model, profile = get_model("cogvideox-5b"), get_profile("cogvideox-5b-l40")
    size = model.default_size
    for layout in (Layout(1, 3, 1), Layout(1, 6, 1), Layout(2, 3, 1)):
        ours, theirs = (predict(model, size, layout, profile, scheme) for scheme in ("ours", "reference"))
        assert ours.decode < theirs.decode and ours.total < theirs.total
        assert max(ours.memory_gib.values()) < max(theirs.memory_gib.values())


def test_groups_that_cross_sockets_and_machines_are_found() -> None:
    links = get_profile("mochi-l40-e2e").links
    assert not spread(Layout(2, 3, 1), links).rings_across  # three and three
    assert spread(Layout(1, 3, 2), links).rings_across == 2
    assert spread(Layout(1, 1, 6), links).ulysses_across
    assert not spread(Layout(1, 1, 3), links).ulysses_across
    apart = spread(Layout(2, 1, 8), get_profile("h100").links, nodes=2)
    assert apart.cfg_out and not apart.ulysses_out
    mixed = spread(Layout(1, 2, 8), get_profile("h100").links, nodes=2)
    assert mixed.ring_out == 8 and not mixed.ulysses_out
    assert spread(Layout(1, 1, 4), get_profile("h100").links, nodes=2).ulysses_out == pytest.approx(4 / 4)


def test_scaling_to_eight_machines_is_limited_by_the_network() -> None:
    model = get_model("cogvideox-1.5-5b")
    size = Size(1360, 768, 161, 50)
    fast = plan(model, size, 64, get_profile("h100", node_gbs=400)).best.total
    slow = plan(model, size, 64, get_profile("h100", node_gbs=5)).best.total
    one = plan(model, size, 8, get_profile("h100")).best.total
    assert fast < slow and fast < one


def test_without_a_name_the_planner_takes_this_machine_as_the_programs_do(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("--model", "mochi", "--gpus", "8")
    monkeypatch.setattr("planner.cli.local_profile", lambda device: None)
    assert "nothing is known of GPUs here; a kind of GPU (l40" in ask(*line, expect=2).output
    for name in ("planner.cli.local_profile", "planner.layouts.local_profile"):
        monkeypatch.setattr(name, lambda device: (get_profile("l40"), "PROFILE"))
    layout, _ = degrees.choose_layout(("mochi",), 8, 24, True)
    assert f"best: {layout} " in ask(*line).stdout
    assert "6 GB/s as given" in ask(*line, "--link", "6").stdout


@pytest.mark.parametrize(
    ("model", "gpu", "published"), [("consisid", "h100", "consisid-h100"), ("mochi", "l40", "mochi-l40-sampling")]
)
def test_a_kind_of_gpu_names_the_published_machines_with_other_links(model: str, gpu: str, published: str) -> None:
    """README's table is of those machines: the answers differ, and each says by what."""
    line = ("--model", model, "--gpus", "6", "--gpu")
    told = [row for row in ask(*line, gpu).stdout.splitlines() if "other published rows" in row]
    assert len(told) == 1 and str(get_profile(published).links) in told[0] and f"--gpu {published} " in told[0]
    assert "other published rows" not in ask(*line, published).stdout


def test_nobodys_own_profile_is_read_here() -> None:
    folder = machine.config_folder()
    assert folder is not None and Path.home() / ".config" not in folder.parents


def test_where_more_gpus_bring_nothing_fewer_are_named() -> None:
    model = get_model("cogvideox-2b")
    whole = plan(model, model.default_size, 8, get_profile("l40", "0.5"))
    found = enough(whole)
    assert found.layout.ranks < 8 and found.total <= 1.03 * whole.best.total
    fast = plan(model, model.default_size, 8, get_profile("h100"))
    assert enough(fast) is fast.best


def test_every_refusal_says_why() -> None:
    model = get_model("mochi")
    found = plan(model, model.default_size, 48, get_profile("h100"), "ours")
    assert {r.layout for r in found.refused} | {p.layout for p in found.layouts} == set(layouts_of(48))
    assert all(str(model.heads) in r.reason for r in found.refused) and found.refused
    unguided = replace(model.default_size, guided=False)
    assert "without guidance" in (refusal(model, unguided, Layout(2, 1, 1), "ours") or "")
    assert "14310" in (refusal(model, model.default_size, Layout(1, 4, 1), "reference") or "")
    assert "rows" in (refusal(get_model("consisid"), model.default_size, Layout(1, 4, 1), "reference") or "")
    small = replace(get_profile("4090"), memory_gib=12)
    assert "each GPU, which has 12" in (refusal(model, model.default_size, Layout(), "ours", small) or "")
    for row in fitted_rows():
        assert refusal(row.model, row.size, row.layout, "reference") is None, row.id


def test_json_has_the_promised_keys() -> None:
    arguments = ["--model", "consisid", "--gpu", "consisid-h100", "--gpus", "6", "--json"]
    layouts = json.loads(ask(*arguments).stdout)
    assert {(o["cfg"], o["ring"], o["ulysses"]) for o in layouts} == {(d.cfg, d.ring, d.ulysses) for d in layouts_of(6)}
    for one in layouts:
        assert {"cfg", "ring", "ulysses", "seconds", "memory_gib", "memory_gb", "bytes", "bound"} <= one.keys()
        assert set(one["seconds"]) == {"total", "sampling", "step", "text", "decode"}
        assert one["seconds"]["step"] * 50 == pytest.approx(one["seconds"]["sampling"])
    assert [o["best"] for o in layouts] == [True] + [False] * (len(layouts) - 1)
    ours = json.loads(ask(*arguments, "--scheme", "ours").stdout)
    assert min(o["seconds"]["total"] for o in ours) < layouts[0]["seconds"]["total"]


def test_the_table_names_the_best_and_what_is_refused() -> None:
    text = ask("--model", "cogvideox-2b", "--gpu", "l40", "--gpus", "64", "--nodes", "8", "--node-link", "25").stdout
    assert "best: cfg" in text and "refused: cfg 1 x ring 1 x ulysses 64: ulysses 64" in text
    assert "as fast on" in text and "8 machines, 25 GB/s" in text
    listed = ask("--list-gpus").stdout
    assert all(name in listed for group in names() for name in group)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu", "l40"], "--model is missing"),
        (["--model", "mochi", "--gpu", "l99"], "l40"),
        (["--model", "mochi", "--gpu", "l40", "--num-frames", "50"], "49 or 55"),
        (["--model", "mochi", "--gpu", "l40", "--width", "850"], "848 or 864"),
        (["--model", "cogvideox-5b", "--gpu", "l40", "--num-frames", "50"], "8k or 8k+1; nearest: 49 or 56"),
        (["--model", "sora", "--gpu", "l40"], "cogvideox-5b"),
        (["--model", "consisid", "--gpu", "l40", "--width", "848"], "720 x 480 pixels only"),
        (["--model", "mochi", "--gpu", "l40", "--link", "wire"], "nvlink"),
        (["--model", "mochi", "--gpu", "l40", "--gpus", "2", "--nodes", "3"], "--nodes 3"),
        (["--model", "mochi", "--gpu", "nowhere.json"], "cannot be read"),
        (["--model", "mochi", "--gpu", "mochi-l40-e2e", "--width", "0"], "--width 0"),
        (["--model", "mochi", "--gpu", "mochi-l40-e2e", "--num-frames", "-3"], "--num-frames -3"),
        (["--model", "mochi", "--gpu", "mochi-l40-e2e", "--num-steps", "-5"], "--num-steps -5"),
        (["--model", "mochi", "--gpu", "l40", "--gpus", "99999999999999999999"], "at most 512"),
        (["--model", "mochi", "--gpu", "l40", "--gpus", "0"], "--gpus 0 is not"),
        (["--model", "mochi", "--gpu", "l40", "--gpus", "2", "--nodes", "0"], "--nodes 0"),
        (["--model", "mochi", "--gpu", "l40", "--width", "16000000000"], "--width 16000000000 is too large"),
        (["--model", "mochi", "--gpu", "l40", "--num-steps", "9" * 30], "is too large"),
    ],
)
def test_wrong_use_says_what_would_be_right(arguments: list[str], told: str) -> None:
    assert told in ask(*arguments, expect=2).output


def test_links_change_the_prediction() -> None:
    def best(*more: str) -> float:
        arguments = ["--model", "mochi", "--gpu", "l40", "--gpus", "8", "--json", *more]
        return json.loads(ask(*arguments).stdout)[0]["seconds"]["total"]

    assert best("--link", "nvlink") < best("--link", "pcie") <= best("--link", "pcie+qpi")
    assert best("--link", "100") < best("--link", "5")


def test_choosing_degrees() -> None:
    layout, why = choose_layout("cogvideox-5b", None, 6, "l40")
    assert layout.ranks == 6 and layout.cfg == 2 and "predicted on l40" in why
    assert choose_layout("mochi", None, 8, "h100", ulysses=8)[0] == Layout(1, 1, 8)
    unguided = replace(get_model("mochi").default_size, guided=False)
    assert choose_layout("mochi", unguided, 4, "h100")[0].cfg == 1
    with pytest.raises(ValueError, match="no layout of 6 ranks has ring 4"):
        choose_layout("mochi", None, 6, "l40", ring=4)


def test_the_rule_decides_where_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.layouts.local_profile", lambda device: None)
    layout, why = choose_layout("mochi", None, 6)
    assert layout == Layout(2, 3, 1) and "rule" in why
    assert choose_layout("mochi", None, 3)[0] == Layout(1, 3, 1)


def test_a_programs_chooser_asks_the_planner_only_where_it_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.layouts.local_profile", lambda device: (get_profile("h100"), "PROFILE"))
    choose = partial(degrees.choose_layout, ("mochi",))
    assert choose(1, 24, True) == (Layout(), "")
    assert choose(6, 24, True, 2, 3, 1) == (Layout(2, 3, 1), "")
    assert choose(8, 24, True, ring=2)[0].ring == 2
    best = choose_layout("mochi", None, 8, "h100")[0]
    layout, why = choose(8, 24, True)
    assert layout == best and why.endswith("; from PROFILE")
    assert choose(6, 4, True) == (Layout(2, 3, 1), RULE)  # a demo's heads: the rule
    assert choose(4, 24, False)[0].cfg == 1
    with pytest.raises(ValueError, match="layouts of 6 ranks"):
        choose(6, 24, True, ring=4)


def test_device_names_are_recognised() -> None:
    assert recognise("NVIDIA A100-SXM4-80GB") == "a100"
    assert recognise("NVIDIA GeForce RTX 4090") == "4090"
    assert recognise("NVIDIA H200") == "h200"
    assert recognise("NVIDIA L40S") == "l40s"
    assert recognise("Radeon") is None


def test_planning_needs_no_torch() -> None:
    code = "import sys, planner.cli; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line() -> None:
    line = [sys.executable, "-m", "planner.cli", "--list-gpus"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_the_size_that_is_asked_for_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.layouts.local_profile", lambda device: (get_profile("l40"), "PROFILE"))
    choose = partial(degrees.choose_layout, ("cogvideox-5b-i2v", "cogvideox-1.5-5b"), 4, 48, True)
    small, large = Size(480, 320, 9, 50), Size(1360, 768, 81, 50)
    seconds = [float(choose(size=size)[1].split(" s ")[0]) for size in (small, large)]
    assert seconds[0] * 5 < seconds[1]


def test_one_answer_to_one_question() -> None:
    """The best layout of a published machine: by its table, by the planner for either scheme, for a kind of GPU."""
    for group in tables.GROUPS:
        table = [row for row in rows() if row.group == group]
        best = min(table, key=lambda row: row.seconds)
        assert f"{best.layout.cfg} x {best.layout.ring} x {best.layout.ulysses}" in tables.published()
        others = [r for r in table if r.layout.ranks == best.layout.ranks and r.model == best.model]
        for scheme in ("reference", "ours"):
            found = plan(best.model, best.size, best.layout.ranks, get_profile(group), scheme, groups=1)
            among = [one.layout for one in found.layouts if one.layout in {row.layout for row in others}]
            assert among[0] == best.layout, (group, scheme)
    six = plan(get_model("mochi"), get_model("mochi").default_size, 6, get_profile("l40"), groups=1).best.layout
    assert six == Layout(2, 3, 1) == degrees.choose_layout(("mochi",), 6, 24, True)[0]


def test_a_published_machine_is_predicted_with_ours_beside_it() -> None:
    text = ask("--model", "consisid", "--gpu", "consisid-h100", "--gpus", "6").stdout
    best = text.splitlines()[2].split()
    assert best[:3] == ["2", "3", "1"]
    assert float(best[3]) == pytest.approx(35.78, rel=3 * get_profile("consisid-h100").error)
    ours_size = get_model("consisid").default_size
    ours = plan(get_model("consisid"), ours_size, 6, get_profile("consisid-h100"), "ours").best
    line = ["--model", "consisid", "--gpu", "consisid-h100", "--gpus", "6", "--json"]
    there = predict(get_model("consisid"), ours_size, Layout(2, 3, 1), get_profile("consisid-h100"), "ours")
    assert json.loads(ask(*line).stdout)[0]["ours"]["total"] == pytest.approx(there.total)
    assert f"{there.total:.1f}" in best and f"{ours.total:.1f} s" in text.split("ours there: ")[1]
    assert f"mean error {100 * get_profile('consisid-h100').error:.1f} %" in text
    kind = ask("--model", "consisid", "--gpu", "h100", "--gpus", "6").stdout
    assert "155 GB/s fitted on wan2.2-a14b-h100" in kind and "--gpu consisid-h100 predicts that machine" in kind


def test_a_video_too_large_for_ours_is_said_beside_the_published_system() -> None:
    line = ("--model", "cogvideox-1.5-5b", "--num-frames", "4001", "--gpu", "mochi-l40-e2e", "--gpus", "2")
    assert "ours there: no layout of 2 GPUs is possible" in ask(*line).stdout


def test_memory_is_that_of_a_dry_run() -> None:
    """In GiB, without what CUDA takes, as the programs count it; the planner's formulas come within a tenth."""
    found = plan(get_model("mochi"), get_model("mochi").default_size, 1, get_profile("l40")).best
    for stage, counted in (("text", 8.9), ("sampling", 20.1), ("decode", 10.9)):  # docs/memory.md
        assert found.memory_gib[stage] == pytest.approx(counted, rel=0.1), stage


def test_nothing_is_advised_that_no_program_does() -> None:
    named = [*options(forks()[0]), *command.params]  # of a program that makes videos, and of the planner itself
    known = {spelling for option in named for spelling in option.opts}
    for gpus in (6, 8, 64):
        text = ask("--model", "mochi", "--gpu", "l40", "--gpus", str(gpus)).stdout
        assert set(re.findall(r"(?<!\w)--[a-z][a-z-]*", text)) <= known
        groups = re.search(r"--replicas (\d+), each cfg (\d+) x ring (\d+) x ulysses (\d+)", text)
        assert groups and math.prod(map(int, groups.groups())) <= gpus
