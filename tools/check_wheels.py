"""Build every distribution, then install each wheel without its siblings in a clean environment and use it.

    python tools/check_wheels.py     exit with 1 if a wheel does not build, install, import or work

The environment holds the wheel and what its metadata asks for, nothing else: no triton, no kernels, no test tools.
It is made once and shared by the wheels one after the other, because installing torch takes a minute.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = [ROOT / "shared-kernels", *sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))]

IMPORT = """
import importlib, importlib.metadata, importlib.util, sys
name, others = sys.argv[1], sys.argv[2:]
package = importlib.import_module(name.replace("-", "_"))
assert package.__version__ == importlib.metadata.version(name), package.__version__
for other in [*others, "kernels", "pytest"]:
    assert importlib.util.find_spec(other.replace("-", "_")) is None, f"{other} is installed"
for public in package.__all__:
    assert getattr(package, public) is not None, public
print(f"{name} {package.__version__}: {len(package.__all__)} public names")
"""

USE = {
    "atman-explain": """
import torch, atman_explain
from transformers import LlamaConfig, LlamaForCausalLM, pipeline
torch.manual_seed(0)
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
found = atman_explain.explain(model, None, [1, 2, 3, 4], target=[5, 6])
assert found.scores.shape == (2, 4) and found.scores.abs().max() > 0, found.scores
again = atman_explain.Explanation.from_dict(found.to_dict())
assert torch.equal(again.scores, found.scores)
assert found._repr_html_().startswith("<") and "units" in str(found)
with atman_explain.steer(model, factors=[1.0, 0.0, 1.0, 3.0]):
    model.generate(torch.tensor([[1, 2, 3, 4]]), max_new_tokens=3, do_sample=False)
""",
    "ledits-pipeline": """
import tempfile, torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from ledits_pipeline import LEditsInversion, LEditsPipeline
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
torch.manual_seed(0)
letters = [chr(ord("a") + i) for i in range(26)]
words = ["<|startoftext|>", *letters, *(letter + "</w>" for letter in letters), "<|endoftext|>"]
text = dict(vocab_size=54, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
ends = dict(max_position_embeddings=16, bos_token_id=0, eos_token_id=53, pad_token_id=53)
blocks = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)
sizes = dict(block_out_channels=(8, 16, 16), layers_per_block=1, cross_attention_dim=32, attention_head_dim=2)
pipe = LEditsPipeline.from_pipe(StableDiffusionPipeline(
    vae=AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4),
    text_encoder=CLIPTextModel(CLIPTextConfig(**text, **ends)),
    tokenizer=CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16),
    unet=UNet2DConditionModel(**blocks, **sizes, norm_num_groups=4),
    scheduler=DPMSolverMultistepScheduler(steps_offset=1),
    safety_checker=None, feature_extractor=None, requires_safety_checker=False,
))
picture = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
made = pipe.invert(picture, num_inversion_steps=4, generator=torch.Generator().manual_seed(0))
with tempfile.TemporaryDirectory() as folder:
    made.save_pretrained(folder)
    again = LEditsInversion.from_pretrained(folder)
edit = dict(editing_prompt=["sunglasses", "cat"], output_type="latent", use_intersect_mask=True)
out, same = (pipe(inversion=each, **edit) for each in (made, again))
assert out.masks.shape == (4, 2, 1, 32, 32) and out.masks.any(), out.masks.shape
assert torch.equal(out.images, same.images)
""",
    "scar-peft": """
import tempfile, torch, scar_peft
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
base = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
ids = torch.tensor([[1, 2, 3, 4]])
plain = base(ids).logits
config = scar_peft.ScarConfig(layers=[1], site="block", concepts=["polite"], n_latents=64, k=8, task_type="CAUSAL_LM")
model = get_peft_model(base, config).eval()
assert torch.equal(model(ids).logits, plain)
steered = model(ids, steering={"polite": 1.0}, return_concept_scores=True)
assert not torch.equal(steered.logits, plain) and steered.concept_scores["polite"].shape == (1, 4)
with tempfile.TemporaryDirectory() as folder:
    scar_peft.compact(model).save_pretrained(folder)
    again = PeftModel.from_pretrained(model.unload(), folder).eval()
    same = again(ids, steering={"polite": 1.0}).logits
assert torch.allclose(same, steered.logits, atol=1e-5), (same - steered.logits).abs().max()
""",
    "shared-kernels": """
import torch
from shared_kernels import csr_gather_sum
out = csr_gather_sum(torch.tensor([0, 2, 2]), torch.tensor([1, 1]), torch.tensor([[1.0], [10.0]]))
assert out.tolist() == [[20.0], [0.0]], out
""",
    "tfree-tokenizer": """
import tempfile, torch
from tfree_tokenizer import TFreeConfig, TFreeForCausalLM, TFreeTokenizer
tokenizer = TFreeTokenizer(words=["hello", "world"])
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
config = TFreeConfig.for_tokenizer(tokenizer, hash_vocab_size=64, num_hashes=4, **sizes)
model = TFreeForCausalLM(config).eval()
model.set_dictionary(tokenizer)
inputs = tokenizer("hello unheard-of world", return_tensors="pt")
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = TFreeForCausalLM.from_pretrained(folder).eval()
    text = TFreeTokenizer.from_pretrained(folder).decode(inputs.input_ids[0])
out, same = (each.generate(**inputs, max_new_tokens=3, do_sample=False) for each in (model, again))
assert torch.equal(out, same), (out, same)
assert text == "hello unheard-of world", text
""",
}


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Run a command; its failure ends the check."""
    subprocess.run([str(each) for each in command], cwd=cwd, check=True, timeout=900)


def build(out: Path) -> dict[str, Path]:
    """Build both archives of each distribution into `out`; the wheels by name."""
    wheels = {}
    for project in PROJECTS:
        run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", out, cwd=project)
        (wheels[project.name],) = out.glob(f"{project.name.replace('-', '_')}-*.whl")
    return wheels


def check(name: str, wheel: Path, python: Path) -> None:
    """Install one wheel, import all of it, use it, and remove it again."""
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", wheel)
    with tempfile.TemporaryDirectory() as elsewhere:  # so that the checkout is not on sys.path
        others = [project.name for project in PROJECTS if project.name != name]
        run(python, "-I", "-c", IMPORT, name, *others, cwd=Path(elsewhere))
        run(python, "-I", "-c", USE[name], cwd=Path(elsewhere))
    run(*pip, "uninstall", "-q", "-y", name)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheels = build(Path(folder) / "dist")
        environment = Path(folder) / "clean"
        run(sys.executable, "-m", "venv", environment)
        for name, wheel in wheels.items():
            check(name, wheel, environment / "bin" / "python")
            print(f"{name}: the wheel works without its siblings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
