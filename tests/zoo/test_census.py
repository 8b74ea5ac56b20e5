"""No stacked weights without a quantized form, but those that are listed here: a transformers with new ones fails."""

import pytest

from zoo.census import instance, stacked, uncovered

FEW = "a few numbers per layer, not a matrix that multiplies"
POSITIONS = "positions, which are added"
# family.Class -> why it has no quantized form
LEFT = {
    "convbert.GroupedLinearLayer": "multiplies groups of columns, unused at the default num_groups of 1",
    "csm.CsmCodebooksHead": "one head per codebook: heads stay float, and it is indexed with the codebook",
    "dinat.NeighborhoodAttention": POSITIONS,
    "edgetam_video.EdgeTamVideoModel": FEW,
    "esmfold2.EsmFold2ConfidenceHead": "a head that is indexed with the atoms of a residue",
    "funnel.FunnelRelMultiheadAttention": "multiplied with positions by einsum, 6 % of the family",
    "gemma4.Gemma4VisionPatchEmbedder": POSITIONS,
    "gemma4_unified.Gemma4UnifiedVisionEmbedder": POSITIONS,
    "kimi_k25.Kimi_K25VisionPositionEmbeddings": POSITIONS,
    "kyutai_speech_to_text.KyutaiSpeechToTextFlexibleLinear": "one layer per codebook, chosen within the forward pass",
    "moshi.MoshiFlexibleLinear": "one layer per codebook, chosen within the forward pass",
    "recurrent_gemma.RecurrentGemmaRglru": "gates of a recurrence, 1 % of the family",
    "sam2_video.Sam2VideoModel": FEW,
    "sam3_lite_text.Sam3LiteTextLayerScaledResidual": FEW,
    "sam3_tracker_video.Sam3TrackerVideoModel": FEW,
    "swin2sr.Swin2SRSelfAttention": FEW,
    "swinv2.Swinv2SelfAttention": FEW,
    "vjepa2.VJEPA2PredictorEmbeddings": FEW,
    "yolos.InterpolateMidPositionEmbeddings": POSITIONS,
    "zamba.ZambaMambaMixer": "the parameters of a state-space recurrence, 4 % of the family",
}
FOUND = {str(found): found for found in stacked()}


def test_the_census_finds_what_is_known():
    assert len(FOUND) > 80 and FOUND["mixtral.MixtralExperts"].shapes == (
        "(num_experts, 2 * intermediate_dim, hidden_dim)",
        "(num_experts, hidden_dim, intermediate_dim)",
    )
    assert {"dbrx.DbrxExperts", "nllb_moe.NllbMoeExperts", "llama4.Llama4TextExperts"} <= set(FOUND)


def test_what_is_listed_is_there():
    assert set(LEFT) <= set(FOUND)


@pytest.mark.parametrize("name", [name for name in FOUND if name not in LEFT])
def test_stacked_weights_have_a_quantized_form(name):
    assert uncovered(instance(FOUND[name])) == [], f"{name} {FOUND[name].shapes}: cover it, or list it with the reason"
