"""terraform/: style, policies, and modules/sizing, which counts as `tidewright plan` does. No provider is at hand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hcl2
import pytest

from helpers.checkov import check_policies
from helpers.families import FAMILIES
from helpers.model_shapes import LLAMA_8B, LLAMA_70B
from helpers.terraform import MISSING, outputs, terraform
from tidewright.config import Settings
from tidewright.models.families import read_config
from tidewright.planning.gpus import GPUS, Gpu
from tidewright.planning.plan import Engine, Load, Machine, Plan, PlanError, make_plan
from tidewright.planning.report import sizing_model

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "terraform"
FILES = sorted(FOLDER.rglob("*.tf"))
MODULES = sorted(path for path in (FOLDER / "modules").iterdir() if path.is_dir())
EXCEPTIONS = {
    "CKV_GCP_12": "Dataplane V2 enforces network policies itself; the option is for clusters without it",
    "CKV_GCP_65": "which Google group administers a cluster is the organisation's to say",
}
# No validation would say more than their type: checks of what they are given are the provider's, or the module's below.
UNVALIDATED = {
    ("eks", "subnet_ids"),
    ("eks", "kms_key_arn"),
    ("gke", "project"),
    ("gke", "network"),
    ("gke", "authorized_cidr"),
    ("tidewright", "kubeconfig"),
    ("tidewright", "context"),
    ("tidewright", "secrets_revision"),
}
SMOLLM = replace(
    LLAMA_8B,
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    layers=LLAMA_8B.layers[:1] * 30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    tied_embeddings=True,
)
# Of two ranks the second has more heads, the first the biases of what is summed.
BIASED = replace(SMOLLM, qkv_bias=True, output_bias=True, mlp_bias=True)
WORDS = (
    "context",
    "concurrent",
    "mean_tokens",
    "gpu",
    "gpus_per_node",
    "headroom",
    "dtype",
    "block_size",
    "size",
    "kv",
    "quantization",
    "head",
)
# Models, then what stands in WORDS; the last three have serve's defaults.
TABLE: list[tuple[Any, ...]] = [
    (LLAMA_8B, 8192, 200, 8192, "H200", 8, 5, "bfloat16", 16, None),
    (LLAMA_8B, 8192, 200, 1300, "L4", 4, 5, "bfloat16", 16, None),
    (LLAMA_8B, 131072, 3, 131072, "H100", 8, 0, "float16", 32, None),
    (LLAMA_8B, 100, 200_000, 100, "B200", 8, 5, "bfloat16", 16, None),
    (LLAMA_8B, 131072, 200_000, 1, "H100", 8, 5, "bfloat16", 1, None),
    (LLAMA_8B, 4096, 64, 4096, "A100-40GB", 2, 10, "float32", 16, None),
    (LLAMA_8B, 4096, 10, 1, "H100", 8, 5, "bfloat16", 16, 3),
    (LLAMA_8B, 4096, 10, 17, "H100", 8, 5, "bfloat16", 16, 32),
    (LLAMA_70B, 8192, 100, 8192, "H200", 8, 5, "bfloat16", 16, None),
    (LLAMA_70B, 2048, 4, 1000, "L4", 4, 5, "bfloat16", 16, None),
    (LLAMA_70B, 2048, 4, 1000, "A40", 3, 5, "bfloat16", 16, None),
    (LLAMA_70B, 2048, 4, 1000, "L40S", 8, 5, "bfloat16", 1, 7),
    (SMOLLM, 8192, 1, 8192, "T4", 1, 5, "float16", 16, None),
    (SMOLLM, 2048, 999, 700, "A30", 8, 5, "bfloat16", 256, 2),
    (BIASED, 2048, 999, 700, "A30", 8, 5, "bfloat16", 16, 2),
    (BIASED, 2048, 999, 700, "A30", 8, 5, "bfloat16", 16, 2, "int8"),
    (LLAMA_8B, 8192, 200, 8192, "H200", 8, 5, "float32", 16, None, "fp8"),
    (LLAMA_8B, 8192, 200, 8192, "H200", 8, 5, "bfloat16", 16, None, "float32"),
    (SMOLLM, 2048, 999, 700, "A30", 9, 33, "bfloat16", 7, 9),
    (LLAMA_8B, 8192, 200, 8192, "H200", 8, 5, "bfloat16", 16, None, "auto", "int8"),
    (BIASED, 2048, 999, 700, "A30", 8, 5, "bfloat16", 16, 3, "int8", "int4-g128", "keep"),
    (LLAMA_70B, 2048, 4, 1000, "L40S", 8, 5, "bfloat16", 16, 7, "auto", "int4-g32", "same"),
    (LLAMA_70B, 2048, 4, 1000, "L40S", 8, 5, "float16", 16, None, "auto", "fp8"),
    (replace(SMOLLM, head_dim=320), 2048, 999, 700, "A30", 8, 5, "bfloat16", 16, 1),
]


def architecture(config: object) -> str:
    return re.sub("(Text)?Config$", "ForCausalLM", type(config).__name__)


# A small model of each family, with biases and norms of all kinds, on one rank and on two.
FAMILY_TABLE: list[tuple[Any, ...]] = [
    (
        read_config({**config.to_dict(), "architectures": [architecture(config)]}),
        200,
        50,
        100,
        "L4",
        8,
        5,
        dtype,
        16,
        size,
    )
    for config in FAMILIES.values()
    for size in (1, 2)
    for dtype in ("bfloat16", "float32")
]


def blocks(kind: str, folder: Path) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """File, name and content of each block of that kind in the folder's own files."""
    for file in sorted(folder.glob("*.tf")):
        for block in hcl2.loads(file.read_text()).get(kind, []):
            for name, content in block.items():
                if not name.startswith("__"):
                    yield file, name.strip('"'), content


def named(case: tuple[Any, ...]) -> dict[str, Any]:
    return {"kv": "auto", "quantization": "auto", "head": "int8", **dict(zip(WORDS, case[1:], strict=False))}


def planned(case: tuple[Any, ...]) -> Plan:
    model, words = case[0], named(case)
    load = Load(context=words["context"], concurrent=words["concurrent"], mean_tokens=words["mean_tokens"])
    machine = Machine(gpu=GPUS[words["gpu"]], gpus_per_node=words["gpus_per_node"], headroom=words["headroom"])
    engine = Engine(
        dtype=words["dtype"],
        kv_cache_dtype=words["kv"],
        quantization=words["quantization"],
        quantize_head=words["head"],
        block_size=words["block_size"],
    )
    return make_plan(model, load, machine, engine, words["size"])


def variables(case: tuple[Any, ...]) -> dict[str, Any]:
    model, words = case[0], named(case)
    return {
        "model": sizing_model(model),
        "context": words["context"],
        "concurrent": words["concurrent"],
        "mean_tokens": words["mean_tokens"],
        "gpu_memory_bytes": GPUS[words["gpu"]].memory,
        "gpus_per_node": words["gpus_per_node"],
        "headroom_percent": words["headroom"],
        "dtype": words["dtype"],
        "kv_cache_dtype": words["kv"],
        "quantization": words["quantization"],
        "quantize_head": words["head"],
        "block_size": words["block_size"],
        "tensor_parallel_size": words["size"],
    }


def figures(plan: Plan) -> dict[str, Any]:
    replica = plan.replica
    return {
        "tensor_parallel_sizes": list(plan.sizes),
        "tensor_parallel_size": replica.tensor_parallel_size,
        "weight_bytes": replica.weights,
        "rotary_table_bytes": replica.tables,
        "step_bytes": replica.step,
        "usable_bytes": replica.usable,
        "kv_bytes_per_token": replica.kv_per_token,
        "kv_bytes_per_sequence": replica.kv_per_sequence,
        "kv_cache_bytes": plan.kv_cache,
        "kv_blocks": plan.kv_blocks,
        "max_sequences": replica.max_sequences,
        "max_longest_sequences": replica.max_longest,
        "replicas": plan.replicas,
        "sequences_per_replica": plan.running,
        "gpus": plan.gpus,
        "nodes": plan.nodes,
        "nodes_per_replica": plan.nodes_per_replica,
    }


def sizing_folder(folder: Path, cases: dict[str, dict[str, Any]]) -> Path:
    """A root module that has all cases counted."""
    (folder / "cases.json").write_text(json.dumps(cases))
    names = next(iter(cases.values()))
    arguments = "\n".join(f"  {name} = each.value.{name}" for name in names)
    (folder / "main.tf").write_text(
        'module "sizing" {\n  source = "./sizing"\n  for_each = jsondecode(file("${path.module}/cases.json"))\n'
        f'{arguments}\n}}\noutput "all" {{\n  value = module.sizing\n}}\n'
    )
    shutil.copytree(FOLDER / "modules" / "sizing", folder / "sizing", ignore=shutil.ignore_patterns(".terraform*"))
    return folder


def test_it_counts_as_plan_does(tmp_path: Path) -> None:
    cases = dict(enumerate([*TABLE, *FAMILY_TABLE]))
    folder = sizing_folder(tmp_path, {str(number): variables(case) for number, case in cases.items()})
    found = outputs(folder)["all"]
    for number, case in cases.items():
        counted, plan = found[str(number)], planned(case)
        assert {name: counted[name] for name in figures(plan)} == figures(plan), case
        assert counted["parameters"] == sizing_model(case[0])["parameters"]
        options = counted["serve_options"]
        settings = Settings(**options, **_hosts(plan))
        assert (settings.max_running, settings.kv_cache_memory) == (plan.running, f"{plan.kv_cache >> 20}MiB")


def _hosts(plan: Plan) -> dict[str, Any]:
    return {"nodes": plan.nodes_per_replica, "rendezvous": "host:29400"} if plan.nodes_per_replica > 1 else {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 12}, "these do: 1, 2, 3, 4, 5, 6, 7, 8, 16, 32"),
        ({"gpu_memory_bytes": 16 * 10**9, "tensor_parallel_size": 1}, "The model does not fit"),
        ({"context": 131073}, "from 1 to the model's limit"),
    ],
)
def test_what_plan_refuses_it_refuses_too(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model, context, *_ = TABLE[0]
    gpu = Gpu("test", changes.get("gpu_memory_bytes", GPUS["H200"].memory), None, None, None, True, "")
    load = Load(context=changes.get("context", context), concurrent=1, mean_tokens=100)
    with pytest.raises(PlanError):
        make_plan(model, load, Machine(gpu=gpu), Engine(), changes.get("tensor_parallel_size"))
    folder = sizing_folder(tmp_path, {"it": variables(TABLE[0]) | {"mean_tokens": 100} | changes})
    terraform(folder, "init", "-backend=false", "-no-color")
    with pytest.raises(AssertionError) as caught:
        terraform(folder, "plan", "-no-color")
    assert message in " ".join(re.sub(r"[│╷╵]", " ", str(caught.value)).split())


def test_its_own_tests_pass_without_a_provider(tmp_path: Path) -> None:
    folder = tmp_path / "sizing"
    shutil.copytree(FOLDER / "modules" / "sizing", folder, ignore=shutil.ignore_patterns(".terraform*"))
    terraform(folder, "init", "-backend=false", "-no-color")
    terraform(folder, "validate", "-no-color")
    assert re.search(r"Success! 12 passed, 0 failed", terraform(folder, "test", "-no-color"))


def test_all_files_are_formatted() -> None:
    terraform(FOLDER, "fmt", "-check", "-recursive", "-diff")


def test_the_shapes_in_examples_are_those_of_the_model() -> None:
    shapes = json.loads((FOLDER / "examples" / "llama-3.1-8b.json").read_text())
    assert shapes.items() <= sizing_model(LLAMA_8B).items()


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_variables_and_outputs_are_described_and_checked(file: Path) -> None:
    folder = file.parent
    for where, name, content in blocks("variable", folder):
        if where != file:
            continue
        assert content.get("type"), f"{name} has no type"
        assert content.get("description", '""').strip('"'), f"{name} has no description"
        is_checked = "validation" in content or content["type"] == "bool"
        excepted = "examples" in file.parts and (folder.name, name) in UNVALIDATED
        assert is_checked != excepted, f"{name} has no validation, or an exception too many"
    for where, name, content in blocks("output", folder):
        assert where != file or content.get("description", '""').strip('"'), f"{name} has no description"


@pytest.mark.parametrize("folder", MODULES, ids=lambda path: path.name)
def test_modules_pin_what_they_need(folder: Path) -> None:
    """And examples give each module what it asks for, and nothing that it does not know."""
    text = (folder / "versions.tf").read_text()
    assert re.search(r'required_version = ">= 1\.\d+"', text)
    assert folder.name == "sizing" or re.search(r'source  = "hashicorp/\w+"\s+version = "[~>=]+ \d', text)
    known = {name: "default" in content for _, name, content in blocks("variable", folder)}
    uses = [
        content
        for example in sorted((FOLDER / "examples").glob("*/"))
        for _, _, content in blocks("module", example)
        if Path(content["source"].strip('"')).name == folder.name
    ]
    assert uses
    for content in uses:
        given = {name for name in content if not name.startswith("__")} - {"source"}
        assert given <= set(known)
        assert {name for name, has_default in known.items() if not has_default} <= given


def test_clusters_have_what_the_manifests_need() -> None:
    """Volumes and policies that are enforced, which EKS comes without; and nodes that take a replica."""
    folder = FOLDER / "modules" / "eks"
    addons = {
        content["addon_name"].strip('"'): str(content.get("configuration_values"))
        for _, kind, named in blocks("resource", folder)
        if kind == "aws_eks_addon"
        for content in named.values()
    }
    assert "enableNetworkPolicy" in addons["vpc-cni"]
    assert "defaultStorageClass" in addons["aws-ebs-csi-driver"]
    (gpu,) = [content for _, name, content in blocks("variable", folder) if name == "gpu_instance_type"]
    assert gpu["default"].strip('"') == "g6.2xlarge"  # 8 cores, 32 GiB, of which the node itself takes some
    for asked, most in (('cpu: "4"', 7), ("memory: 16Gi", 28)):
        assert f"{asked}\n" in rendered(ROOT / "k8s" / "overlays" / "single-gpu")
        assert int(re.findall(r"\d+", asked)[0]) <= most


def test_policies() -> None:
    check_policies(FOLDER, "terraform", EXCEPTIONS)


@pytest.fixture(scope="module")
def splitter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """modules/tidewright without its resources: variables, and what is made of the manifests."""
    folder = tmp_path_factory.mktemp("splitter")
    source = FOLDER / "modules" / "tidewright"
    found = re.search(r"^locals \{.*?^\}", (source / "main.tf").read_text(), re.MULTILINE | re.DOTALL)
    assert found
    output = (
        'output "objects" {\n  value = keys(local.objects)\n}\noutput "namespace" {\n  value = local.namespace\n}\n'
    )
    (folder / "main.tf").write_text(f"{found[0]}\n{output}")
    shutil.copy(source / "variables.tf", folder)
    terraform(folder, "init", "-backend=false", "-no-color")
    return folder


def overlays() -> list[Path]:
    found = sorted(path.parent for path in (ROOT / "k8s" / "overlays").glob("*/kustomization.yaml"))
    assert found
    return found


@pytest.mark.parametrize("overlay", overlays(), ids=lambda path: path.name)
def test_every_object_of_an_overlay_is_applied(splitter: Path, overlay: Path) -> None:
    text = rendered(overlay)
    kinds = re.findall(r"^kind: (\w+)$", text, re.MULTILINE)
    found = split(splitter, text)
    assert len(found["objects"]) == len(kinds) - kinds.count("Namespace") - kinds.count("Secret")
    assert found["namespace"]["metadata"]["name"] == "tidewright"


def test_the_example_makes_all_secrets_that_production_asks_for() -> None:
    """One that is missing keeps pods from starting; a Redis without a password would take anyone."""
    ((_, _, module),) = blocks("module", FOLDER / "examples" / "tidewright")
    text = rendered(ROOT / "k8s" / "overlays" / "production")
    asked = set(re.findall(r"secretName: (\S+)", text))
    references = re.findall(r"(?:secretKeyRef|credentials):\n +key: \S+\n +name: (\S+)(\n +optional: true)?", text)
    asked |= {name for name, optional in references if not optional}
    assert {name.strip('"') for name in module["secret_names"]} == asked
    assert {name.strip('"') for name in module["secrets"] if not name.startswith("__")} == asked


def test_texts_that_are_no_manifests_are_refused(splitter: Path) -> None:
    namespace = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: tidewright\n"
    config = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: it\ndata:\n  text: |\n    a\n    ---\n    b\n"
    found = split(splitter, f"{namespace}---\n{config}")
    assert found["objects"] == ["ConfigMap/it"]
    for text, message in ((config, "must hold one Namespace"), (f"{namespace}---\n- 1\n", "must be YAML documents")):
        with pytest.raises(AssertionError, match=message):
            split(splitter, text)


def split(folder: Path, manifests: str) -> dict[str, Any]:
    (folder / "it.auto.tfvars.json").write_text(
        json.dumps({"manifests": manifests, "secrets": {"tidewright-keys": {"keys.yaml": "keys: []"}}})
    )
    return outputs(folder)


def rendered(overlay: Path) -> str:
    done = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, check=True)
    return done.stdout


def test_a_machine_without_terraform_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(AssertionError, match=re.escape(MISSING)):
        terraform(FOLDER, "version")
