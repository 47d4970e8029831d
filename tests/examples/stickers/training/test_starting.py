import torch

from conceptmaster.engine.checkpoints.safetensors_io import load
from conceptmaster.engine.model import ConceptMaster
from conceptmaster.engine.presets import preset
from conceptmaster.examples.stickers.training.reading import look_near
from conceptmaster.examples.stickers.training.starting import start_from_sprites
from conceptmaster.examples.stickers.training.train import SPRITES

from ..small import small_config


def test_of_the_sprites_weights_everything_fits_but_what_reads():
    torch.manual_seed(0)
    model = ConceptMaster(preset("stickers"))
    assert start_from_sprites(model, SPRITES / "model.safetensors") == []
    old, own = load(SPRITES / "model.safetensors")[0], model.state_dict()
    name = "transformer.blocks.3.injector.to_k.weight"
    assert torch.equal(own[name], old[name].float())
    name = "transformer.patch_embedding.weight"
    assert own[name].shape[1] == 192 + 24 and not own[name][:, 128:192].any()  # no notice of new channels yet


@torch.no_grad()
def test_heads_begin_by_looking_near():
    encoder = ConceptMaster(small_config()).text_encoder
    look_near(encoder)
    attention = encoder.model.encoder.block[0].layer[0].SelfAttention
    bias = attention.compute_bias(12, 12)[0]  # [A,12,12]
    before, behind, both, alike = bias[:, 6]
    assert before[5] > before[3] > before[7] and behind[7] > behind[9] > behind[5]
    assert both[5] == both[7] > both[3] == both[9]
    assert not alike.any()
    assert all(row.argmax() == 6 or row[6] == row.max() for row in bias[:, 6])
