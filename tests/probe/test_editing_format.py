"""The edit format (docs/edit-format.md): written and read bit for bit, readable by anyone, malformed files refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from activations_cache.hashing import weights_hash
from probe.editing import Edit, ablate, project_out, remove_experts
from probe.errors import EditError
from probe.targets import Direction, Experts
from tests.architectures import tiny

TENSORS, RECORD = "edit.safetensors", "edit.json"


def direction(seed: int = 5) -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


def edits(model) -> dict[str, Edit]:
    """One edit of each kind of entry and structure, for a Mixtral or a tied Gemma."""
    made = {"project": project_out(model, Direction("blocks.0.hook_resid_post", direction(), evidence={"auc": 0.9}))}
    if hasattr(model.config, "num_local_experts"):
        made["zero"] = remove_experts(model, [(0, 1)])
        made["prune"] = remove_experts(model, Experts(((0, 1), (1, 2)), 4), "prune")
        with made["prune"].applied(model):
            made["both"] = made["prune"] + project_out(model, direction())
    else:
        made["neurons"] = ablate(model, [(0, 3), (1, 5)])
    return made


@pytest.mark.parametrize("name", ["mixtral", "gemma2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_edits_give_the_same_bits(name, dtype, tmp_path):
    model = tiny(name, dtype=dtype)
    before = weights_hash(model)
    for kind, edit in edits(model).items():
        loaded = Edit.load(edit.save(tmp_path / kind))
        with edit.applied(model):
            expected = weights_hash(model)
        with loaded.applied(model):
            assert weights_hash(model) == expected != before
        assert loaded.to_df().equals(edit.to_df())
        assert loaded.base == edit.base
        assert [dict(s.settings) for s in loaded.steps] == [dict(s.settings) for s in edit.steps]
        assert [s.evidence for s in loaded.steps] == [s.evidence for s in edit.steps]
        assert [s.target for s in loaded.steps] == [s.target for s in edit.steps]
    assert weights_hash(model) == before


def test_saving_again_gives_the_same_bytes(tmp_path):
    edit = project_out(tiny("llama"), direction())
    first = edit.save(tmp_path / "a")
    second = Edit.load(first).save(tmp_path / "b")
    for file in (TENSORS, RECORD):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_the_format_can_be_applied_by_hand(tmp_path):
    """As the document says, with json and safetensors alone: low-rank factors on the checkpoint's tensors."""
    model = tiny("llama")
    folder = project_out(model, direction()).save(tmp_path)
    record, tensors = json.loads((folder / RECORD).read_text()), load_file(folder / TENSORS)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (step,) = record["steps"]
    for name, entry in step["parameters"].items():
        if entry["kind"] == "low_rank":
            a, b = (tensors[entry["tensors"][role]] for role in ("A", "B"))
            state[name] = (state[name].float() + a @ b).to(state[name].dtype)
        else:
            assert entry["kind"] == "dense"
            state[name] = tensors[entry["tensors"]["values"]]
    with Edit.load(folder).applied(model):
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_audit_summary_travels_with_the_edit(tmp_path):
    edit = project_out(tiny("llama"), direction()).with_audit({"verdict": "partly removed", "forget": 0.25})
    assert Edit.load(edit.save(tmp_path)).audit == {"verdict": "partly removed", "forget": 0.25}


@pytest.fixture
def saved(tmp_path) -> Path:
    return remove_experts(tiny("mixtral"), [(0, 1)]).save(tmp_path / "edit")


def rewrite(folder: Path, change) -> None:
    record = json.loads((folder / RECORD).read_text())
    change(record)
    (folder / RECORD).write_text(json.dumps(record))


def first_parameter(record: dict) -> dict:
    return next(iter(record["steps"][0]["parameters"].values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format="other"), "not the record of an edit"),
        (lambda r: r.update(format_version=2), "format version 2"),
        (lambda r: r.pop("steps"), "'steps' is missing"),
        (lambda r: r.update(steps={}), "'steps' must be list"),
        (lambda r: r.update(steps=[]), "no steps"),
        (lambda r: r.update(steps=[1]), "must be an object"),
        (lambda r: r.pop("base"), "'base' is missing"),
        (lambda r: r.pop("tensors_sha256"), "'tensors_sha256' is missing"),
        (lambda r: r.update(audit=3), "'audit'"),
        (lambda r: r["steps"][0].pop("base_hash"), "'base_hash' is missing"),
        (lambda r: r["steps"][0].update(method=3), "'method' must be str"),
        (lambda r: r["steps"][0].update(parameters={}), "changes nothing|does not name"),
        (lambda r: r["steps"][0].update(renamed={"a": 1}), "names must be strings"),
        (lambda r: r["steps"][0].update(removed=[["a"]]), "malformed"),
        (lambda r: r["steps"][0].update(added={"x": {"tensor": "none"}}), "no tensor 'none'"),
        (lambda r: r["steps"][0].update(added={"x": {}}), "'tensor' is missing"),
        (lambda r: first_parameter(r).update(kind="pickle"), "unknown kind"),
        (lambda r: first_parameter(r).update(shape=[2, 2]), "shape"),
        (lambda r: first_parameter(r).update(shape="wide"), "'shape' must be list"),
        (lambda r: first_parameter(r)["tensors"].pop("values", None), "needs the tensors"),
        (lambda r: first_parameter(r)["tensors"].update(values="elsewhere"), "no tensor 'elsewhere'"),
        (lambda r: first_parameter(r).update(norm="large"), "'norm'"),
    ],
)
def test_malformed_records_are_one_clear_error(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(EditError, match=message):
        Edit.load(saved)


def test_missing_truncated_and_foreign_files_are_one_clear_error(saved, tmp_path):
    with pytest.raises(EditError, match="does not exist"):
        Edit.load(tmp_path / "nowhere")
    body = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(body[:-7])
    with pytest.raises(EditError, match="SHA-256 differs"):
        Edit.load(saved)
    rewrite(saved, lambda r: r.update(tensors_sha256=hashlib.sha256(body[:-7]).hexdigest()))
    with pytest.raises(EditError, match="readable safetensors"):
        Edit.load(saved)
    (saved / TENSORS).unlink()
    with pytest.raises(EditError, match="cannot be read"):
        Edit.load(saved)
    (saved / RECORD).write_text("{")
    with pytest.raises(EditError, match="readable JSON"):
        Edit.load(saved)
    (saved / RECORD).write_bytes(b"\xff\xfe")
    with pytest.raises(EditError, match="readable JSON"):
        Edit.load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_on_both_sides(saved, value, tmp_path):
    tensors = load_file(saved / TENSORS)
    key = next(key for key, tensor in tensors.items() if tensor.is_floating_point())
    tensors[key] = torch.full_like(tensors[key], value)
    save_file(tensors, saved / TENSORS)
    rewrite(saved, lambda r: r.update(tensors_sha256=hashlib.sha256((saved / TENSORS).read_bytes()).hexdigest()))
    with pytest.raises(EditError, match="NaN or infinity"):
        Edit.load(saved)
    base, broken = tiny("llama"), tiny("llama")
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = value
    with pytest.raises(EditError, match="NaN or infinity"):
        Edit.from_models(base, broken).save(tmp_path / "broken")
    assert not (tmp_path / "broken" / RECORD).exists()


def test_tensors_that_the_record_does_not_name_are_refused(saved):
    tensors = load_file(saved / TENSORS)
    save_file({**tensors, "stowaway": torch.zeros(1)}, saved / TENSORS)
    rewrite(saved, lambda r: r.update(tensors_sha256=hashlib.sha256((saved / TENSORS).read_bytes()).hexdigest()))
    with pytest.raises(EditError, match="stowaway"):
        Edit.load(saved)


def test_a_record_that_is_no_json_leaves_an_earlier_edit_alone(saved):
    before = {file: (saved / file).read_bytes() for file in (TENSORS, RECORD)}
    edit = project_out(tiny("llama"), direction()).with_audit({"figure": object()})
    with pytest.raises(EditError, match="JSON"):
        edit.save(saved)
    assert before == {file: (saved / file).read_bytes() for file in (TENSORS, RECORD)}
    assert sorted(path.name for path in saved.iterdir()) == [RECORD, TENSORS]


def test_a_path_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EditError, match="cannot be written"):
        project_out(tiny("llama"), direction()).save(tmp_path / "file")
