"""The demo's part on AtMan: what a continuation rests on, what an answer looks at, and steering."""

import json
from pathlib import Path

from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import atman_explain as am
from examples.page import Section

TEXT_MODEL = Path("miniatures/tfree/checkpoint")
PICTURE_MODEL = Path("miniatures/captioner/checkpoint")
SCENES = Path("miniatures/captioner/examples")
NUM_SCENES = 3
PROMPT, TARGET = "In the beginning God created the heaven and the", "earth"
STEERED = "To insert a picture into a table, choose"
WEIGHTS = {"as it is": {}, "“table” removed": {"table": 0.0}, "“table” threefold": {"table": 3.0}}


def atman_section(out: Path) -> Section:
    """Show a text heat map, image overlays, and a continuation before and after steering."""
    section = Section("AtMan: what did the model look at?")
    section.text(
        "Attention to one word or image patch is weakened, and the model runs again. What the answer loses is the "
        "score of that word or patch: red supports the answer, blue speaks against it. Forward passes only."
    )
    tokenizer = AutoTokenizer.from_pretrained(TEXT_MODEL, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(TEXT_MODEL, trust_remote_code=True, dtype="float32").eval()
    _explain_text(section, model, tokenizer, out)
    _explain_pictures(section, out)
    _steer(section, model, tokenizer)
    return section


def _explain_text(section: Section, model: object, tokenizer: object, out: Path) -> None:
    found = am.explain(model, tokenizer, PROMPT, target=TARGET)
    print(f"AtMan, on the T-FREE miniature\n{found}")
    section.text("Why does the T-FREE miniature expect this word?")
    section.figure(found.plot(), out / "atman-text.png", f"What “{TARGET}” rests on")


def _explain_pictures(section: Section, out: Path) -> None:
    processor = AutoProcessor.from_pretrained(PICTURE_MODEL)
    model = AutoModelForImageTextToText.from_pretrained(PICTURE_MODEL, dtype="float32").eval()
    section.text("Where does the captioner miniature look when it names what is at a place of a scene?")
    scenes = json.loads((SCENES / "examples.json").read_text(encoding="utf-8"))
    for number, scene in list(enumerate(scenes))[:NUM_SCENES]:
        prompt = next(each["prompt"] for each in scene["questions"] if each["kind"] == "what")
        image = Image.open(SCENES / f"{number:02d}.png").convert("RGB")
        found = am.explain(model, processor, prompt, images=[image], units="image", max_new_tokens=3)
        answer = " ".join(target.text.strip() for target in found.targets)
        caption = f"{prompt.removeprefix('<image> ')} {answer}"
        print(f"AtMan, on the captioner miniature: {caption}")
        section.figure(am.plot_overlay(found, image), out / f"atman-image-{number}.png", caption)


def _steer(section: Section, model: object, tokenizer: object) -> None:
    inputs = tokenizer(STEERED, return_tensors="pt")
    rows = []
    for name, weights in WEIGHTS.items():
        with am.steer(model, tokenizer, STEERED, weights, mode="log_additive"):
            ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        rows.append((name, tokenizer.decode(ids[0], skip_special_tokens=True)))
        print(f"AtMan, steering, {name}: {rows[-1][1]!r}")
    section.text("The same switch steers: one prompt, a word removed or strengthened while the model writes.")
    section.table(("attention", "the model writes"), rows)
