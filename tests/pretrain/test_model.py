import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import CheckpointError, ConfigError
from pretrain.checkpoint import export_model, model_folder
from pretrain.model.clip import ClipModel, read_model_config
from pretrain.model.geometries import Cosine
from pretrain.model.patches import PatchGather
from pretrain.model.similarity import load_similarity
from pretrain.model.tokenizer import END_ID, Tokenizer, clean
from pretrain.run_tokenizer import with_tokenizer
from tests.pretrain.conftest import TINY_MODEL

TEXTS = [
    "a red square",
    "Caf&eacute; &amp;amp; R\u00e9sum\u00e9",
    "",
    "  many   words " * 5,
    "naïve ☃ 漢字",
    "it's 3.5!",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    captions = ["a red square", "a café & résumé of many words", "it's 3.5!"]
    return Tokenizer.train_words(captions, vocab_size=40, context_length=8)


@pytest.fixture(scope="module")
def model(tokenizer) -> ClipModel:
    torch.manual_seed(0)
    return ClipModel(with_tokenizer(TINY_MODEL, tokenizer)).eval()


def test_the_vocabulary_is_ordered_by_count_then_by_word():
    made = Tokenizer.train_words(["b b a a c"], vocab_size=40, context_length=6)
    assert made(["a b c zebra"]).tolist() == [[3, 4, 5, 1, END_ID, 0]]


def test_a_long_text_is_cut_and_still_ends_with_the_end_token(tokenizer):
    ids = tokenizer(["a red square " * 20])
    assert ids.shape == (1, 8)
    assert ids[0, -1] == END_ID


@given(st.text(st.characters(codec="ascii"), max_size=60))  # ftfy may mend more the second time
def test_cleaning_twice_changes_nothing_more_in_plain_text(text):
    once = clean(text.replace("&", "and"))
    assert clean(once) == once


def test_no_text_gives_no_rows(tokenizer):
    assert tokenizer([]).shape == (0, 8)


def test_kept_patches_are_gathered_and_the_class_token_stays():
    gather = PatchGather()
    tokens = torch.arange(2 * 5, dtype=torch.float32).reshape(2, 5, 1)
    gather.kept_bK = torch.tensor([[0, 3], [1, 2]], dtype=torch.int16)
    assert gather(tokens)[..., 0].tolist() == [[0, 1, 4], [5, 7, 8]]


def test_keeping_every_patch_changes_nothing(model, tokenizer):
    image = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    token = tokenizer(TEXTS[:3])
    everything = torch.arange(16, dtype=torch.int16).expand(3, -1)
    whole, kept = model(image, token), model(image, token, everything)
    assert torch.equal(whole.image_bD, kept.image_bD)


def test_open_clip_loads_the_exported_folder_with_the_same_features(model, tokenizer, tmp_path):
    import open_clip

    source = tmp_path / "model"
    source.mkdir()
    model.save(source, dict(model.named_parameters()))
    tokenizer.save(source)
    folder = export_model(source, tmp_path / "exported")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs.eval()
    pixels = np.random.default_rng(0).integers(0, 256, (len(TEXTS), 16, 16, 3), dtype=np.uint8)
    from PIL import Image

    batch = torch.stack([preprocess(Image.fromarray(p)) for p in pixels])
    ours = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), tokenizer(TEXTS))
    embed = model.similarity.embed
    assert torch.equal(theirs.encode_image(batch, normalize=True), embed(ours.image_bD))
    their_tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    assert torch.equal(their_tokenizer(TEXTS), tokenizer(TEXTS))
    assert torch.equal(
        theirs.encode_text(their_tokenizer(TEXTS), normalize=True), embed(ours.text_bD)
    )
    assert torch.equal(Tokenizer.load(folder)(TEXTS), tokenizer(TEXTS))
    assert load_similarity(folder).name == "cosine"


def test_class_vectors_are_normalised_before_and_after_the_mean():
    features = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])  # lengths 3 and 1 must weigh the same
    assert torch.allclose(Cosine().class_vectors(features), torch.tensor([[0.5, 0.5]]).sqrt())


def test_what_is_not_a_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        model_folder(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"is not a checkpoint: neither a run with checkpoints/latest"
    ):
        model_folder(tmp_path)


def test_an_unknown_model_lists_what_is_shipped():
    with pytest.raises(ConfigError, match=r"model 'vit-nothing' is neither .*glyph-vit-s"):
        read_model_config("vit-nothing")


def test_every_wrong_key_of_a_model_file_is_named_at_once(tmp_path: Path):
    path = tmp_path / "wrong.json"
    towers = {"vision_cfg": {"widht": 64, "layers": [1, 2]}, "text_cfg": {"hf_model_name": "x"}}
    path.write_text(json.dumps({"vision_cgf": {}, **towers}))
    with pytest.raises(ConfigError) as caught:
        read_model_config(str(path))
    for expected in (
        "5 problem(s)",
        "vision_cgf: there is no such key, did you mean 'vision_cfg'?",
        "vision_cfg.widht: there is no such key, did you mean 'width'?",
        "text_cfg.hf_model_name: only open_clip's own towers",
        "embed_dim: a number is required",
        "vision_cfg.layers: a ResNet",
    ):
        assert expected in str(caught.value)


@pytest.mark.parametrize("text", ["[]", '{"embed_dim": 3}'])
def test_a_model_file_without_towers_is_named(tmp_path: Path, text: str):
    path = tmp_path / "no.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="expected an object with embed_dim, vision_cfg"):
        read_model_config(str(path))


def test_open_clips_defaults_are_filled_in(tmp_path: Path):
    path = tmp_path / "short.json"
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}))
    config = read_model_config(str(path))
    assert config["vision_cfg"]["image_size"] == 224
    assert config["text_cfg"]["context_length"] == 77


def test_a_control_token_in_a_caption_is_text(tokenizer):
    ids = tokenizer(["<end> a red square <pad>"])[0].tolist()
    assert ids.count(END_ID) == 1


def test_a_model_file_that_is_not_json_is_named(tmp_path: Path):
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.json is not valid JSON"):
        read_model_config(str(path))


def test_open_clips_own_models_are_found_by_name():
    assert read_model_config("ViT-B-32")["embed_dim"] == 512
    assert json.dumps(read_model_config("ViT-B-32"))
