"""Where a prompt's images are: the columns of their patches, and the grid that these form."""

from dataclasses import replace

from transformers import PreTrainedModel

from .prompts_atman import EncodedPrompt, ImageColumns


def locate_images(model: PreTrainedModel, prompt: EncodedPrompt) -> EncodedPrompt:
    """Find the image columns of a prompt that a vision-language model reads.

    Raises:
        ValueError: there are pictures, but no image tokens in the prompt, or not as many as the pictures need.
    """
    if "pixel_values" not in prompt.model_inputs:
        return prompt
    config = model.config
    image_id = next(i for n in ("image_token_id", "image_token_index") if (i := getattr(config, n, None)) is not None)
    columns = [column for column, index in enumerate(prompt.input_ids) if index == image_id]
    count = prompt.model_inputs["pixel_values"].shape[0]
    each = len(columns) // count
    side = round(each**0.5)
    images = tuple(
        ImageColumns(columns=tuple(columns[i * each : (i + 1) * each]), grid=(side, side)) for i in range(count)
    )
    return replace(prompt, images=images)
