"What reports say, from rows that are known; every number of a page is one of them."
import re
import shlex

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from mld.cli import parameters_of
from mld.page import command, markdown_table, provenance, write_pages
from mld.layout import arranged, bounds_table, by_number, sections
from mld.report import paper_values, show_by_given, show_front, titled
from mld.stages import ROW, write_rows

SAMPLERS = {"MLD": [("em", 50), ("dpm", 20)], "MLD (paper)": [("em", 50), ("dpm", 20)], "MOPOE": [("own", 1), ("mixture", 1)]}


def rows_of(source="open", seeds=(0, 1), table="mnist_svhn", dataset="mnist_svhn", preset="laptop"):
    facts = dict(table=table, dataset=dataset, source=source, preset=preset, n=100, network_params=7, train_steps=5, seconds=.1, device="cpu",
                 torch="2", commit="abc1234", created="2026-01-02T03:04:05+00:00")
    rows = []
    for variant, samplers in SAMPLERS.items():
        model = "MOPOE" if variant == "MOPOE" else "MLD"
        for seed in seeds:
            same = {**facts, "variant": variant, "seed": seed}
            for bound, value in (("real", .97), ("reconstruction", .5 if model == "MOPOE" else .91)):
                rows += [{**same, "model": bound, "metric": m, "given": "", "target": t, "sampler": "", "nfe": 0, "value": v}
                         for m, t, v in (("coherence", "joint", value), ("coherence", "mnist", value), ("coherence", "svhn", value), ("fmd", "svhn", 10 * value))]
            for sampler, nfe in samplers:
                here = {**same, "model": model, "sampler": sampler, "nfe": nfe}
                cases = [("coherence", "", "joint", .80), ("fmd", "", "mnist", 11.), ("fmd", "", "svhn", 13.), ("samples a second", "", "all", 55.),
                         ("training seconds", "", "all", 66.)]
                if sampler != "mixture": cases += [("coherence", "mnist", "svhn", .60), ("coherence", "svhn", "mnist", .70)]
                rows += [{**here, "metric": m, "given": g, "target": t, "value": v + .02 * seed} for m, g, t, v in cases]
    return pd.DataFrame(rows)[ROW]


def test_a_table_has_a_line_a_model_and_sampler_and_means_over_seeds():
    table = arranged(titled(rows_of()), ["coherence"])
    assert [*table.index] == [("MLD", "em", "50"), ("MLD", "dpm", "20"), ("MLD (paper)", "em", "50"), ("MLD (paper)", "dpm", "20"), ("MOPOE", "own", "1"), ("MOPOE", "mixture", "1")]
    assert [*table.columns] == [("coherence", "joint", ""), ("coherence", "mnist", "svhn"), ("coherence", "svhn", "mnist")]
    assert [*table.iloc[0]] == ["81.0 ± 1.4", "71.0 ± 1.4", "61.0 ± 1.4"] and [*table.iloc[-1]] == ["81.0 ± 1.4", "", ""]


def test_by_number_subsets_and_targets_are_averaged_before_seeds():
    table = arranged(titled(rows_of()), ["coherence"], by_number)
    assert [*table.columns] == [("coherence", "joint"), ("coherence", "1 given")] and table["coherence", "1 given"].iloc[0] == "66.0 ± 1.4"


def test_network_calls_that_differ_by_case_do_not_part_a_line():
    rows = rows_of()
    table = arranged(titled(rows.assign(nfe=rows.nfe.mask(rows.given != "", 2 * rows.nfe))), ["coherence"])
    assert table.index[0] == ("MLD", "em", "50 to 100") and len(table) == 6


def test_variants_with_the_same_reconstructions_share_a_line_and_real_data_has_one():
    table = bounds_table(rows_of())
    assert [*table.index] == ["real data", "reconstruction, MLD, MLD (paper)", "reconstruction, MOPOE"]
    assert table["coherence", "svhn"].tolist() == ["97.0", "91.0", "50.0"]


def test_stand_ins_stand_apart_and_only_data_of_the_paper_has_differences():
    paper = paper_values("mnist_svhn")
    both = pd.concat([rows_of("open"), rows_of("paper", dataset="mnist_svhn")])
    titles = [title for title, _ in sections(both, paper)]
    first_stand_in = next(i for i, t in enumerate(titles) if "stand-in" in t)
    assert all("stand-in" in t for t in titles[first_stand_in:-1]) and titles[-1].startswith("published")
    beside = [table for title, table in sections(both, paper) if title.startswith("beside")]
    assert len(beside) == 1 and set(beside[0].index.get_level_values("source")) == {"paper"} and beside[0].difference.str.match(r"[+-]\d").all()
    assert not [t for t, _ in sections(rows_of("open"), paper) if t.startswith("beside")]


def test_without_rows_the_published_values_are_still_shown():
    found = sections(rows_of().iloc[:0], paper_values("mnist_svhn"))
    assert found[0][0] == "no finished run found" and "85.22" in found[1][1].to_string() and "†" in found[1][1].to_string()


@pytest.mark.parametrize("table, preset, models, seeds", [
    ("mnist_svhn", "laptop", ["MLD", "MLD (paper)", "MMVAE+ (K=10)"], [0, 1]), ("variants", "laptop", ["MLD-Uni"], [2]), ("samplers", "smoke", ["MLD"], [3])])
def test_the_command_of_a_number_is_one_that_runs(table, preset, models, seeds):
    dataset = "polydigits" if table == "samplers" else "mnist_svhn"
    words = shlex.split(command(table, dataset, "open", preset, models, seeds))
    assert words[:3] == ["mld", "run", table]
    said = dict(zip((w.lstrip("-") for w in words[3::2]), words[4::2]))
    asked = {"models": lambda v: v.split(","), "seeds": lambda v: [*map(int, v.split(","))], "seed": int}
    its, _ = parameters_of(table, {k: asked.get(k, str)(v) for k, v in said.items() if k != "set"}, [said["set"]] if "set" in said else [])
    assert its["preset"] == preset and its.get("models", models) == models and its.get("seeds", [its.get("seed")]) == seeds
    assert its.get("datasets", [dataset]) == [dataset]


def test_provenance_tells_commits_and_machines_apart():
    rows = pd.concat([rows_of(), rows_of(seeds=(2,)).assign(commit="def5678+", device="gpu")])
    made = provenance(rows)
    assert made.index.get_level_values("commit").tolist() == ["abc1234", "def5678+"] and made.seeds.tolist() == ["0, 1", "2"]
    assert made.numbers.sum() == len(rows)


def test_figures_have_a_point_a_model_and_sampler_and_a_line_for_what_is_given():
    ax = show_front(rows_of())
    assert len(ax.collections[-1].get_offsets()) == 6
    ax = show_by_given(rows_of())
    assert {t.get_text() for t in ax.get_legend().get_texts()} >= {"MLD, em", "MOPOE, own"} and [t.get_text() for t in ax.get_xticklabels()] == ["joint", "1 given"]
    plt.close("all")


@pytest.fixture
def results(tmp_path):
    write_rows(tmp_path / "mnist_svhn" / "laptop.csv", rows_of(preset="laptop"))
    write_rows(tmp_path / "recipe" / "laptop.csv", rows_of("embedded", (0,), "recipe", "polydigits"))
    (tmp_path / "mnist_svhn" / "laptop.html").write_text("an executed notebook")
    (tmp_path / "mnist_svhn" / "figures").mkdir()
    plt.subplots()[0].savefig(tmp_path / "mnist_svhn" / "figures" / "joint.png")
    plt.close("all")
    return tmp_path


def test_a_page_has_every_table_and_refers_to_nothing_outside(results):
    text, html = (path.read_text() for path in write_pages(results))
    for told in (text, html):
        assert "81.0 ± 1.4" in told and "open stand-in" in told and "abc1234" in told and "85.22" in told and "://" not in told
    for heading in ("## mnist_svhn", "## recipe", "### mnist_svhn: pictures"): assert heading + "\n" in text
    assert html.count("<table") == text.count("| --- |\n") and len(html) < 100_000
    no_rows = text.partition("## Without numbers")[2]
    assert "polymnist" in no_rows and "mnist_svhn" not in no_rows.replace("polymnist", "")


def test_the_links_of_a_page_lead_somewhere(results):
    text, html = (path.read_text() for path in write_pages(results))
    linked = re.findall(r"\]\(([^)#]+)\)", text)
    assert {"mnist_svhn/laptop.csv", "mnist_svhn/laptop.html", "mnist_svhn/figures/joint.png"} <= set(linked)
    assert all((results / link).exists() for link in linked + re.findall(r'(?:src|href)="([^"#]+)"', html))
    assert all(f'id="{anchor}"' in html for anchor in re.findall(r"\]\(#([^)]+)\)", text))


def test_a_page_written_twice_is_the_same(results):
    before = [path.read_text() for path in write_pages(results)]
    assert [path.read_text() for path in write_pages(results)] == before


def test_bars_in_a_cell_do_not_part_it():
    assert markdown_table(pd.DataFrame({"a": ["x|y"]})).splitlines()[-1] == "| x\\|y |"
