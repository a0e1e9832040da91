"The repository agrees with itself: configuration files, notebooks and package, README and index."
import ast
import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml


def pyproject(root):
    return tomllib.loads((root / "pyproject.toml").read_text())


def notebooks(root, *parts):
    return [p for p in sorted((root / "nbs").joinpath(*parts).rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


def test_settings_ini_agrees_with_pyproject(root):
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(root / "settings.ini")
    ini, toml = ini["DEFAULT"], pyproject(root)
    project, nbdev = toml["project"], toml["tool"]["nbdev"]
    assert ini["lib_name"] == project["name"] and ini["description"] == project["description"]
    assert ini["requirements"].split() == project["dependencies"]
    assert ini["dev_requirements"].split() == project["optional-dependencies"]["dev"]
    assert ini["min_python"] == project["requires-python"].lstrip(">=")
    assert ini["keywords"].split() == project["keywords"]
    assert ini["author"] == project["authors"][0]["name"]
    assert ini["console_scripts"].split("=")[1] == project["scripts"]["mld"]
    for key in ("nbs_path", "lib_path", "tst_flags"):
        assert ini[key] == nbdev[key]
    assert ini["allowed_cell_metadata_keys"].split() == nbdev["allowed_cell_metadata_keys"] == ["tags"]
    assert ini["clear_all"].lower() == str(nbdev["clear_all"]).lower() == "false"
    import mld
    assert ini["version"] == mld.__version__


def test_environment_yml_agrees_with_pyproject(root):
    env, project = yaml.safe_load((root / "environment.yml").read_text()), pyproject(root)["project"]
    conda = [d for d in env["dependencies"] if isinstance(d, str)]
    pip = next(d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    assert pip == project["dependencies"] + project["optional-dependencies"]["dev"]
    python = next(d for d in conda if d.startswith("python=")).split("=")[1]
    least = project["requires-python"].lstrip(">=")
    assert tuple(map(int, python.split("."))) >= tuple(map(int, least.split(".")))


def test_the_packages_that_were_asked_for_are_required(root):
    names = {re.split(r"[><=]", d)[0] for d in pyproject(root)["project"]["dependencies"] + pyproject(root)["project"]["optional-dependencies"]["dev"]}
    assert {"torch", "jupyterlab", "papermill", "nbdev", "seaborn", "torchvision", "pytorch-fid"} <= names


def test_notebooks_and_package_are_in_step(root, tmp_path):
    for name in ("nbs", "mld", "pyproject.toml", "settings.ini", "README.md"):
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, tmp_path / name)
    shutil.rmtree(tmp_path / "nbs" / "runs", ignore_errors=True)
    for command in ("nbdev-export", "nbdev-clean"):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=tmp_path, check=True, capture_output=True)
    for path in [*notebooks(tmp_path), *sorted((tmp_path / "mld").rglob("*.py"))]:
        mine = root / path.relative_to(tmp_path)
        assert mine.exists(), f"{mine} is missing: nbdev-export makes it"
        assert path.read_text() == mine.read_text(), f"{mine} is not what nbdev-export and nbdev-clean leave"


def test_every_module_has_a_notebook(root):
    for path in (root / "mld").rglob("*.py"):
        if path.name in ("__init__.py", "_modidx.py"):
            continue
        source = re.search(r"File to edit: (\S+?\.ipynb)", path.read_text())
        assert source and (path.parent / source[1]).resolve().exists(), f"{path} has no notebook"


@pytest.mark.parametrize("folder", ["tables", "studies"])
def test_table_notebooks_have_one_parameters_cell_and_no_outputs(root, folder):
    for path in notebooks(root, folder):
        nb = nbformat.read(path, 4)
        assert sum("parameters" in c.metadata.get("tags", []) for c in nb.cells) == 1, path
        assert not any(c.get("outputs") for c in nb.cells), path
        assert nb.metadata.kernelspec.name == "python3" and nb.metadata.kernelspec.language == "python", path
        code = "\n".join(c.source for c in nb.cells if c.cell_type == "code")
        assert not re.search(r"^\s*(def|class) ", code, re.M), f"{path} defines something; that belongs into the library"
        imported = re.findall(r"^(?:from|import) (\w+)", code, re.M)
        assert set(imported) <= {"mld", "pandas", "IPython"}, f"{path} imports {imported}"


def used_modules(path, root):
    "Top-level modules of mld that a module imports, whether it names them relatively (as nbdev exports them) or not."
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        package = path.relative_to(root).parent.parts
        base = package[:len(package) - node.level + 1] if node.level else ()
        parts = (*base, *(node.module or "").split("."))
        if parts[0] == "mld" and len(parts) > 1 and parts[1]:
            yield parts[1]


def test_imports_go_one_way(root):
    order = ["modality", "sde", "toy", "nets", "denoiser", "guidance", "samplers", "training", "autoencoders", "model", "data", "vision", "metrics", "baselines",
             "settings", "stages", "experiment", "measure", "report", "figures", "layout", "page", "notebooks", "distributed", "plan", "batch", "bench", "cli"]
    found = 0
    for path in (root / "mld").rglob("*.py"):
        here = path.relative_to(root / "mld").with_suffix("").parts[0]
        for used in used_modules(path, root) if here in order else ():
            found += 1
            assert order.index(used) <= order.index(here), f"{path} imports mld.{used}"
    assert found > 20, "the imports were not read"


def test_every_import_is_a_requirement(root):
    project = pyproject(root)["project"]
    wanted = {re.split(r"[><=]", d)[0] for d in project["dependencies"] + [d for name in ("baselines", "clip", "cluster") for d in project["optional-dependencies"][name]]}
    called = {"PIL": "pillow", "huggingface_hub": "huggingface-hub", "lightning_fabric": "lightning-fabric", "pytorch_fid": "pytorch-fid", "sklearn": "scikit-learn"}
    for path in (root / "mld").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"mld", "nbformat"}:  # nbformat: of nbconvert
                assert called.get(top, top) in wanted, f"{path} imports {top}, which pyproject.toml does not require"


def test_readme_and_index_say_the_same(root):
    cells = [c for c in nbformat.read(root / "nbs" / "index.ipynb", 4).cells if not c.source.startswith("#| hide")]
    text = "\n\n".join(f"```python\n{c.source}\n```" if c.cell_type == "code" else c.source for c in cells)
    assert text.replace("](../", "](") == (root / "README.md").read_text().strip()


def test_the_table_of_the_readme_is_that_of_the_rows(root):
    from mld.page import front_table, markdown_table
    assert markdown_table(front_table(root / "results")) in (root / "README.md").read_text()


def test_readme_names_the_two_commands(root):
    readme, make = (root / "README.md").read_text(), (root / "Makefile").read_text()
    for command in ("demo", "test"):
        assert f"make {command}" in readme and re.search(rf"^{command}:", make, re.M)
    ci = (root / ".ci" / "run").read_text()
    assert "make test" in ci and "make demo PRESET=smoke" in ci


def test_prose_is_prose(root):
    "A cell written by a script may keep the marks of a comment, and then every line of it is shown as a heading."
    for path in notebooks(root):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "markdown":
                assert sum(line.startswith("# ") for line in cell.source.split("\n")) <= 1, f"{path}: {cell.source[:80]!r}"
                assert not cell.source.startswith("# #"), f"{path}: {cell.source[:80]!r}"


def test_notebooks_name_no_place_of_the_machine_they_were_run_on(root):
    for path in [*notebooks(root), *(root / "results").rglob("*.ipynb")]:
        for i, cell in enumerate(nbformat.read(path, 4).cells):
            text = cell.source + str(cell.get("outputs", ""))
            assert not (found := re.search(r"/(tmp|root|home|Users|work)/[\w.]+", text)), f"{path}, cell {i}: {found[0]}"


def test_links_between_notebooks_lead_somewhere(root):
    for path in notebooks(root):
        for cell in nbformat.read(path, 4).cells:
            for link in re.findall(r"\]\(([\w./-]+\.(?:ipynb|md|csv|png|cff))\)", cell.source if cell.cell_type == "markdown" else ""):
                assert (path.parent / link).exists(), f"{path} links to {link}"
