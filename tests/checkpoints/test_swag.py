# SPDX-License-Identifier: Apache-2.0
"""Every key of the published SWAG files, torchvision's names for the same weights, and resized position embeddings."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")

import tokenprune_ext as tp
from tokenprune_ext.checkpoints import swag as source

MANIFESTS = sorted(
    path
    for folder in ("swag", "swag_methods")
    for path in (Path(__file__).parents[1] / "manifests" / folder).glob("*.json")
)
TINY = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 12}


def tiny(**options):
    from tokenprune_ext.models.swag import swag_vit

    return swag_vit(**TINY | {"num_classes": 5} | options)


NAMES = (
    ("cls_token", "class_token"),
    ("pos_embed", "encoder.pos_embedding"),
    ("patch_embed.proj.", "conv_proj."),
    ("norm1.", "ln_1."),
    ("norm2.", "ln_2."),
    ("norm.", "encoder.ln."),
    ("attn.qkv.", "self_attention.in_proj_"),
    ("attn.proj.", "self_attention.out_proj."),
    ("mlp.fc", "mlp.linear_"),
    ("blocks.", "encoder.layers.layer_"),
    ("head.", "head.layers.head."),
)


def official(model):
    """The weights of a model under the official names."""
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in NAMES:
            name = name.replace(ours, theirs)
        state[name] = value.transpose(0, 1) if name.endswith("pos_embedding") else value
    return state


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_key_of_the_published_files(path):
    manifest = json.loads(path.read_text())
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in manifest["keys"].items()}
        model = tp.create_model(manifest["name"], image_size=manifest["image_size"])
        assert source.matches(state)
        tp.load_checkpoint(model, state)
        assert sum(p.numel() for p in model.parameters()) == manifest.get("num_parameters", manifest.get("num_params"))


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_official_names_are_loaded(classifier):
    model = tiny(classifier=classifier)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    target = tiny(classifier=classifier)
    tp.load_checkpoint(target, {"model": official(model)})
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(target(images), model(images))


def test_torchvision_names_are_loaded():
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.vision_transformer.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=5
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    images = torch.randn(2, 3, 32, 32)
    model = tp.load_checkpoint(tiny(), network.state_dict())
    torch.testing.assert_close(model.eval()(images), network.eval()(images), atol=1e-4, rtol=1e-4)


def test_reduced_models_take_the_same_file():
    model = tiny()
    torch.nn.init.normal_(model.head.weight)
    reduced = tp.patch(tiny(), "tome", r=0)
    tp.load_checkpoint(reduced, official(model))
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(reduced(images), model(images))


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_position_embeddings_of_another_resolution(classifier):
    model, target = tiny(classifier=classifier), tiny(classifier=classifier, image_size=56)
    tp.load_checkpoint(target, official(model))
    front = int(classifier == "token")
    assert torch.equal(target.pos_embed[:, :front], model.pos_embed[:, :front])
    for theirs, ours in ((0, 0), (3, 6), (12, 42), (15, 48)):  # aligned corners: the corners stay
        torch.testing.assert_close(target.pos_embed[:, front + ours], model.pos_embed[:, front + theirs])


def test_resize_keeps_a_fitting_map_and_refuses_others():
    embedding = torch.randn(17, 1, 3)
    assert torch.equal(source.resize_pos_embedding(embedding, (4, 4)), embedding)
    assert source.resize_pos_embedding(embedding, (2, 5)).shape == (11, 1, 3)
    assert source.resize_pos_embedding(embedding.bfloat16(), (5, 5)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="square number of patch entries, got 17"):
        source.resize_pos_embedding(embedding, (4, 4), class_token=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 1}, "12 unexpected keys: blocks.1"),
        ({"num_layers": 3}, "12 missing keys: blocks.2"),
        ({"hidden_dim": 16}, "other shapes: cls_token"),
        ({"num_classes": None}, "2 unexpected keys: head"),
    ],
)
def test_another_architecture_is_refused(options, message):
    with pytest.raises(ValueError, match=rf"layout: swag.*{message}"):
        tp.load_checkpoint(tiny(**options), official(tiny()))


def test_the_source_can_be_named():
    model = tiny()
    tp.load_checkpoint(model, official(tiny()), source="swag")
    with pytest.raises(ValueError, match="missing keys"):
        tp.load_checkpoint(model, {"a": torch.ones(1)}, source="swag")
