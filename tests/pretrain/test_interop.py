"""A checkpoint's model in transformers and timm gives the features that open_clip gives."""

import functools

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import CheckpointError
from pretrain.huggingface import export_huggingface
from pretrain.model.clip import ClipModel, open_clip, read_model_config
from pretrain.model.tokenizer import Tokenizer

TEXTS = ["a white chess queen", "A Greek  small letter alpha!", "zebra", "a a a " * 30, ""]


def model_folder(folder, tokenizer, *, with_eos=True, **changes):
    """Write a small model with random weights as a checkpoint does."""
    config = read_model_config("glyph-vit-s")
    text = {**config["text_cfg"], "vocab_size": tokenizer.vocab_size}
    if with_eos:
        text |= {"pool_type": "eos", "eos_id": tokenizer.end_id}
    text["hf_tokenizer_name"] = "tokenizer.json"
    config = {**config, "text_cfg": text, **changes}
    torch.manual_seed(0)
    model = ClipModel(config)
    for parameter in model.parameters():  # nothing stays at zero or one
        torch.nn.init.normal_(parameter, std=0.05)
    folder.mkdir()
    model.save(folder, model.state_dict())
    tokenizer.save(folder)
    return model.eval()


def words():
    return Tokenizer.train_words(TEXTS[:2], vocab_size=40, context_length=14)


@pytest.mark.parametrize("make", [words, lambda: Tokenizer.clip(14)], ids=["words", "clip"])
def test_transformers_gives_the_features_of_both_towers_from_pictures_and_raw_texts(tmp_path, make):
    tokenizer = make()
    ours = model_folder(tmp_path / "model", tokenizer, with_eos=not tokenizer.is_clip)
    export_huggingface(tmp_path / "model", tmp_path / "exported")
    from transformers import AutoTokenizer, CLIPModel

    theirs = CLIPModel.from_pretrained(tmp_path / "exported").eval()
    read = AutoTokenizer.from_pretrained(tmp_path / "exported")
    image = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    tokens = read(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = (
            ours.clip.encode_image(ours.pixels(image)),
            ours.clip.encode_text(tokenizer(TEXTS)),
        )
        found = (
            theirs.get_image_features(pixel_values=ours.pixels(image)).pooler_output,
            theirs.get_text_features(**{k: tokens[k] for k in ("input_ids", "attention_mask")}),
        )
    found = (found[0], found[1].pooler_output)
    for ours_bD, theirs_bD in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs_bD, ours_bD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs.logit_scale, ours.clip.logit_scale.reshape(()))


def test_timm_gives_the_features_of_the_image_tower(tmp_path):
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    ours = model_folder(tmp_path / "model", words())
    vision = ours.config["vision_cfg"]
    theirs = VisionTransformer(
        img_size=vision["image_size"],
        patch_size=vision["patch_size"],
        embed_dim=vision["width"],
        depth=vision["layers"],
        num_heads=vision["width"] // vision["head_width"],
        num_classes=ours.config["embed_dim"],
        pre_norm=True,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-5),
    ).eval()
    weights = load_file(tmp_path / "model" / "open_clip_model.safetensors")
    theirs.load_state_dict(checkpoint_filter_fn(weights, theirs))
    pixels = ours.pixels(torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8))
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(pixels), ours.clip.encode_image(pixels), rtol=1e-4, atol=1e-5
        )


def test_what_transformers_has_not_is_refused_with_every_reason(tmp_path):
    config = read_model_config("glyph-vit-s")
    vision = {**config["vision_cfg"], "pool_type": "avg", "no_ln_pre": True}
    model_folder(tmp_path / "model", words(), vision_cfg=vision, init_logit_bias=-10.0)
    with pytest.raises(CheckpointError, match="no CLIPModel") as raised:
        export_huggingface(tmp_path / "model", tmp_path / "exported")
    for reason in ("vision_cfg.pool_type = avg", "vision_cfg.no_ln_pre = True", "init_logit_bias"):
        assert reason in str(raised.value)
    assert not (tmp_path / "exported").exists()


def test_the_exported_folder_of_open_clips_form_is_the_same_model(tmp_path):
    ours = model_folder(tmp_path / "model", words())
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'model'}").eval()
    pixels = ours.pixels(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    with torch.no_grad():
        assert torch.equal(theirs.encode_image(pixels), ours.clip.encode_image(pixels))
