"""Where the images of a prompt are: columns and grids, for every way in which models take pictures."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from atman_explain import UnsupportedModelError
from atman_explain.remote.images_atman import locate_images, patch_grids
from atman_explain.remote.prompts_atman import EncodedPrompt

IMAGE = 9


def model(model_type: str = "llava", patch: Any = 4, **fields: Any) -> Any:
    config = SimpleNamespace(
        model_type=model_type,
        image_token_id=IMAGE,
        vision_config=SimpleNamespace(patch_size=patch, image_size=16),
        get_text_config=SimpleNamespace,
        **fields,
    )
    return SimpleNamespace(config=config)


def prompt(ids: list[int], **inputs: Tensor) -> EncodedPrompt:
    texts = tuple("<image>" if index == IMAGE else str(index) for index in ids)
    return EncodedPrompt(input_ids=tuple(ids), tokens=texts, special=(False,) * len(ids), model_inputs=inputs)


def located(of: Any, ids: list[int], **inputs: Tensor) -> list[tuple[tuple[int, int], tuple[int, ...]]]:
    return [(image.grid, image.columns) for image in locate_images(of, prompt(ids, **inputs)).images]


def test_a_token_per_patch():
    assert located(model(), [1, *[IMAGE] * 16, 2], pixel_values=torch.rand(1, 3, 16, 16)) == [
        ((4, 4), tuple(range(1, 17)))
    ]


def test_pictures_need_not_be_square():
    (grid, columns), *others = located(model(), [1, *[IMAGE] * 8, 2], pixel_values=torch.rand(1, 3, 8, 16))
    assert (grid, len(columns), others) == ((2, 4), 8, [])


def test_patches_need_not_be_square():
    ((grid, _),) = located(model(patch=[4, 8]), [*[IMAGE] * 8], pixel_values=torch.rand(1, 3, 16, 16))
    assert grid == (4, 2)


def test_several_pictures_divide_the_columns_in_order():
    ids = [1, IMAGE, IMAGE, IMAGE, IMAGE, 2, IMAGE, IMAGE, IMAGE, IMAGE]
    assert located(model(), ids, pixel_values=torch.rand(2, 3, 8, 8)) == [
        ((2, 2), (1, 2, 3, 4)),
        ((2, 2), (6, 7, 8, 9)),
    ]


def test_pictures_may_follow_each_other_without_a_break():
    found = located(model(), [IMAGE] * 8, pixel_values=torch.rand(2, 3, 8, 8))
    assert [columns for _, columns in found] == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_a_class_token_before_the_patches_is_no_patch():
    found = located(model(), [1, *[IMAGE] * 10], pixel_values=torch.rand(2, 3, 8, 8))
    assert found == [((2, 2), (2, 3, 4, 5)), ((2, 2), (7, 8, 9, 10))]


@pytest.mark.parametrize(("side", "tokens", "grid"), [(32, 16, (4, 4)), (16, 4, (2, 2)), (16, 1, (1, 1))])
def test_a_token_may_stand_for_a_square_of_patches(side, tokens, grid):
    assert located(model(), [IMAGE] * tokens, pixel_values=torch.rand(1, 3, side, side))[0][0] == grid


def test_squares_at_the_border_may_be_incomplete():
    ((grid, _),) = located(model(), [IMAGE] * 9, pixel_values=torch.rand(1, 3, 20, 20))  # 5 x 5 patches, 2 x 2 each
    assert grid == (3, 3)


def test_parts_of_a_picture_are_images_of_their_own():
    pixels = torch.rand(1, 3, 3, 8, 8)
    ids = [5, IMAGE, 6, IMAGE, 7, IMAGE, 8]
    assert located(model("idefics3"), ids, pixel_values=pixels) == [((1, 1), (1,)), ((1, 1), (3,)), ((1, 1), (5,))]


def test_parts_of_nothing_but_zeros_are_filling():
    pixels = torch.rand(1, 3, 3, 8, 8)
    pixels[:, 2] = 0
    assert len(located(model("idefics3"), [5, IMAGE, 6, IMAGE, 8], pixel_values=pixels)) == 2


def test_grids_that_the_processor_tells():
    found = located(
        model("qwen2_vl"),
        [1, *[IMAGE] * 6, 2, *[IMAGE] * 2],
        pixel_values=torch.rand(32, 12),
        image_grid_thw=torch.tensor([[1, 4, 6], [1, 4, 2]]),
    )
    assert found == [((2, 3), (1, 2, 3, 4, 5, 6)), ((2, 1), (8, 9))]


def test_frames_are_images_of_their_own():
    found = located(
        model("qwen2_vl"), [IMAGE] * 8, pixel_values=torch.rand(32, 12), image_grid_thw=torch.tensor([[2, 4, 4]])
    )
    assert [grid for grid, _ in found] == [(2, 2), (2, 2)]


def test_sizes_that_the_processor_tells_leave_the_filling_out():
    ids = [1, IMAGE, IMAGE, IMAGE, 7, IMAGE, IMAGE, IMAGE, 8, IMAGE, IMAGE, 7]  # a token after every row of patches
    found = located(model(), ids, pixel_values=torch.rand(2, 3, 8, 12), image_sizes=torch.tensor([[8, 12], [4, 8]]))
    assert found == [((2, 3), (1, 2, 3, 5, 6, 7)), ((1, 2), (9, 10))]


@pytest.mark.parametrize(
    ("size", "grid"), [((16, 32), (4, 8)), ((32, 16), (8, 4)), ((32, 24), (8, 6)), ((8, 32), (2, 8))]
)
def test_llava_next_has_the_whole_picture_and_its_parts_without_their_padding(size, grid):
    rows, cols = grid
    of = model("llava_next", image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]])
    ids = [1, *[IMAGE] * (16 + rows * (cols + 1)), 2]
    found = located(of, ids, pixel_values=torch.rand(1, 3, 3, 16, 16), image_sizes=torch.tensor([size]))
    assert [each for each, _ in found] == [(4, 4), grid]
    assert found[1][1][: cols + 1] == (*range(17, 17 + cols), 18 + cols)  # the token that ends a row is left out


def test_a_feature_map_of_a_square_picture_is_square():
    assert located(model("gemma3n", patch=None), [IMAGE] * 9, pixel_values=torch.rand(1, 3, 8, 8))[0][0] == (3, 3)


@pytest.mark.parametrize(
    ("of", "inputs", "lengths"),
    [
        pytest.param(
            model("idefics2", perceiver_config={}), {"pixel_values": torch.ones(1, 2, 3, 16, 16)}, [4, 4], id="queries"
        ),
        pytest.param(
            model("llava_onevision"),
            {"pixel_values": torch.ones(1, 3, 3, 16, 16), "image_sizes": torch.tensor([[20, 30]])},
            [3, 5],
            id="unknown layout",
        ),
        pytest.param(model("fuyu", patch=None), {"image_patches": torch.ones(1, 9, 12)}, [3, 5], id="other inputs"),
    ],
)
def test_tokens_without_a_place_form_a_row_with_a_warning(of, inputs, lengths):
    ids = [1, IMAGE, IMAGE, IMAGE, 2, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE]
    with pytest.warns(UserWarning, match=r"lie in the picture is unknown, so each image is shown as a single row"):
        found = located(of, ids, **inputs)
    assert [grid for grid, _ in found] == [(1, length) for length in lengths]
    assert [column for _, columns in found for column in columns] == [1, 2, 3, 5, 6, 7, 8, 9]


def test_text_has_no_images():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert locate_images(model(), prompt([1, 2, 3])).images == ()


def test_models_of_text_have_no_images():
    of = SimpleNamespace(config=SimpleNamespace(model_type="llama", get_text_config=lambda: None))
    assert locate_images(of, prompt([1, IMAGE])).images == ()


def test_image_tokens_need_a_picture():
    with pytest.raises(ValueError, match=r"prompt has 2 image tokens \('<image>'\) but no image came with it; pass im"):
        locate_images(model(), prompt([1, IMAGE, IMAGE]))


def test_pictures_need_image_tokens():
    with pytest.raises(ValueError, match=r"images were given but prompt has no image token \(id 9\); put the process"):
        located(model(), [1, 2], pixel_values=torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("of", "count", "inputs"),
    [
        (model(), 5, {"pixel_values": torch.ones(3, 3, 16, 16)}),
        (model("qwen2_vl"), 5, {"image_grid_thw": torch.tensor([[1, 4, 4]]), "pixel_values": torch.ones(16, 2)}),
        (model(), 5, {"pixel_values": torch.ones(1, 3, 8, 12), "image_sizes": torch.tensor([[8, 12]])}),
        (
            model("llava_next", image_grid_pinpoints=[[16, 32]]),
            5,
            {"pixel_values": torch.ones(1, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 32]])},
        ),
    ],
)
def test_tokens_must_be_as_many_as_the_pictures_need(of, count, inputs):
    with pytest.raises(
        ValueError, match=r"prompt has 5 image tokens but its \d images? ha.* put one image token per im"
    ):
        located(of, [1, *[IMAGE] * count], **inputs)


@pytest.mark.parametrize("kind", ["no image token", "cross-attention"])
def test_models_that_read_pictures_elsewhere_are_refused(kind):
    of = model("mllama")
    if kind == "no image token":
        del of.config.image_token_id
    else:
        of.config.get_text_config = lambda: SimpleNamespace(cross_attention_layers=[1])
    with pytest.raises(UnsupportedModelError, match="SimpleNamespace takes no images as part of its input sequence"):
        located(of, [1, IMAGE], pixel_values=torch.rand(1, 3, 8, 8))


def test_grids_of_the_tower_are_finer_than_those_of_the_tokens():
    inputs = {"image_grid_thw": torch.tensor([[1, 4, 6], [2, 2, 2]])}
    assert patch_grids(model().config, inputs) == [(4, 6), (2, 2), (2, 2)]
    assert patch_grids(model().config, {"pixel_values": torch.ones(2, 3, 8, 12)}) == [(2, 3), (2, 3)]
    assert patch_grids(model(patch=None).config, {"pixel_values": torch.ones(2, 3, 8, 12)}) is None
