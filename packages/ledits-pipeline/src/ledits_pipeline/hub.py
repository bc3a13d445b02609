"""What a saved pipeline needs beside its components so that others load it without this package: code and a card."""

import json
import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

CODE_NAME = "pipeline.py"  # what diffusers looks for in `custom_pipeline=folder`
CARD_MARK = "<!-- written by ledits-pipeline; remove this line to keep your own text -->"
"""A card with this line is replaced by the next upload."""

_BUNDLED = Path(__file__).parent / "remote" / "pipeline_ledits.py"
_CARD = """
# {title}

{mark}

A diffusion model that edits real pictures by text with LEDITS++: a picture is turned into the noise that gives it back,
and several edits at once change it where two masks from the model itself allow it.

```python
import torch
from diffusers import DiffusionPipeline
from PIL import Image

pipe = DiffusionPipeline.from_pretrained("{place}", trust_remote_code=True)
picture = Image.radial_gradient("L").convert("RGB")  # yours: Image.open("picture.png").convert("RGB")
pipe.invert(picture, num_inversion_steps={steps}, generator=torch.Generator().manual_seed(0))
out = pipe(
    editing_prompt=["sunglasses", "cat"],
    reverse_editing_direction=[False, True],  # add the one, remove the other
    edit_guidance_scale=[8.0, 6.0],
    edit_threshold=[0.9, 0.8],
)
out.images[0].save("edited.png")
```

The code that `trust_remote_code` runs is `pipeline.py` in this repository; with `pip install ledits-pipeline` the same
class is `ledits_pipeline.LEditsPipeline`. Component family: {family}.

## Limits

- Edits inherit what the model can draw, and its biases. Nothing better than the autoencoder's own reconstruction of the
  picture can come back.
- Edited pictures of people can deceive: say that a picture was edited, and edit people only with their consent.
- The license of the model's weights holds for this copy, too.

Method: [LEDITS++: Limitless Image Editing using Text-to-Image Models](https://arxiv.org/abs/2311.16711).
"""


def is_packaged() -> bool:
    """Whether this code runs from the installed package, not from a copy in a repository."""
    return _BUNDLED.is_file()


def write_code(folder: str | Path) -> None:
    """Put the pipeline's code into a saved pipeline, and its name into `model_index.json`."""
    shutil.copyfile(_BUNDLED if is_packaged() else __file__, Path(folder) / CODE_NAME)
    index = Path(folder) / "model_index.json"
    fields = json.loads(index.read_text(encoding="utf-8"))
    fields["_class_name"] = [Path(CODE_NAME).stem, "LEditsPipeline"]
    index.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def pipeline_card(place: str, *, family: str, steps: int, license: str | None = None) -> ModelCard:  # noqa: A002
    """The page of a repository that holds an editing pipeline.

    Args:
        place: the repository, as readers load it.
        family: name of the model family.
        steps: inversion steps in the example.
        license: of the model's weights, as the Hub names it.
    """
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",
        license=license,
        tags=["ledits++", "image-editing", "custom_code"],
    )
    text = _CARD.format(title=place.rpartition("/")[2], mark=CARD_MARK, place=place, steps=steps, family=family)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def keeps_card(repo_id: str, *, token: str | bool | None = None) -> bool:
    """Whether the repository has a card that somebody wrote."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    if not api.file_exists(repo_id, "README.md"):
        return False
    text = Path(api.hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8")
    return bool(ModelCard(text).text.strip()) and CARD_MARK not in text
