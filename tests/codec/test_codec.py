import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isic_vq.codec.codec import compress, decompress
from isic_vq.codec.container import CodecError, read_container
from isic_vq.models.configuration_pixelcnn import PixelCNNConfig
from isic_vq.models.likelihood import score_codes
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.modeling_pixelcnn import PixelCNNModel
from tiny_repository import PRIOR

COUNTS = [5, 0, 3, 2, 9, 1, 4, 8]


@pytest.mark.parametrize("portable", [False, True], ids=["prior", "portable"])
@pytest.mark.parametrize("lanes", [1, 4, 11, 64])
def test_codes_and_names_come_back_bit_by_bit(model, codes, names, lanes, portable):
    file = compress(model, codes, names, code_counts=COUNTS, portable=portable, lanes=lanes)
    back = decompress(model, file.content, COUNTS)
    assert torch.equal(back.codes, codes)
    assert (back.names, back.damage) == (names, [])
    assert (file.num_fallbacks, file.num_blocks, file.num_images) == (0, -(-11 // lanes), 11)


@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 2), st.integers(0, 10**6))
def test_any_codes_come_back_under_any_class(model, number, lanes, label, seed):
    codes = torch.randint(8, (number, 4, 4), generator=torch.Generator().manual_seed(seed))
    names = [str(index) for index in range(number)]
    file = compress(model, codes, names, label=label, lanes=lanes)
    assert torch.equal(decompress(model, file.content).codes, codes)


@pytest.mark.parametrize("label", [None, 1])
def test_the_prior_costs_its_cross_entropy(model, label):
    codes = model.prior.sample(torch.rand(200, 16, dtype=torch.float64), torch.full((200,), 1))
    names = [str(index) for index in range(200)]
    file = compress(model, codes, names, label, lanes=100)
    labels = None if label is None else torch.full((200,), label)
    bits = score_codes(model, codes, labels).sum().item()
    constant = 2 * 64  # two blocks, each filled up to words of 32 bits
    assert bits - 1 <= 8 * file.payload_bytes <= 1.01 * bits + constant


@pytest.fixture(scope="module")
def clustered_model(model):
    """A prior with clusters of unequal frequencies, in eval mode."""
    config = PixelCNNConfig(**PRIOR | {"num_clusters": 5})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        prior = PixelCNNModel(config).eval()
        for parameter in prior.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        prior.cluster_scores.copy_(torch.randn(prior.cluster_scores.shape))
        prior.cluster_weights.copy_(torch.randint(1, 10**9, prior.cluster_weights.shape))
    return IsicVQModel.from_parts(model.vqvae, prior)


@pytest.mark.parametrize("lanes", [1, 4, 64])
def test_codes_come_back_under_a_prior_with_clusters(clustered_model, codes, names, lanes):
    for label in (None, 1):
        file = compress(clustered_model, codes, names, label=label, lanes=lanes)
        assert file.num_fallbacks == 0
        assert torch.equal(decompress(clustered_model, file.content).codes, codes)


def test_a_prior_with_clusters_costs_its_bound(clustered_model):
    codes = torch.randint(8, (200, 4, 4), generator=torch.Generator().manual_seed(5))
    assert len(clustered_model.prior.clusters_of(codes).unique()) > 2, "premise: several clusters occur"
    file = compress(clustered_model, codes, [str(index) for index in range(200)], 1, lanes=100)
    bits = score_codes(clustered_model, codes, torch.full((200,), 1)).sum().item()
    assert bits - 1 <= 8 * file.payload_bytes <= 1.001 * bits + 2 * 64


def test_the_static_table_costs_its_cross_entropy(model, codes, names):
    file = compress(model, codes, names, code_counts=COUNTS, portable=True)
    shares = (torch.tensor(COUNTS, dtype=torch.float64) + 1) / (sum(COUNTS) + 8)
    bits = -shares[codes].log2().sum().item()
    assert bits - 1 <= 8 * file.payload_bytes <= 1.01 * bits + 64


def test_the_decoder_uses_the_threads_of_the_file_and_gives_them_back(model, codes, names):
    before = torch.get_num_threads()
    file = compress(model, codes, names, threads=2)
    assert read_container(file.content)[0].layout.threads == 2
    torch.set_num_threads(1)
    try:
        assert torch.equal(decompress(model, file.content).codes, codes)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_model_in_train_mode_codes_as_in_eval_mode(model, codes, names):
    training = copy.deepcopy(model).train()
    assert compress(training, codes, names).content == compress(model, codes, names).content
    assert training.prior.training


def test_a_block_whose_decoding_differs_falls_back_to_static_tables(drifting_model, model, codes, names):
    # Each block opens the cache to be coded (even) and to be decoded (odd): the second block's decoding differs.
    file = compress(drifting_model(0.5, {3}), codes, names, code_counts=COUNTS, lanes=4)
    _, _, blocks = read_container(file.content)
    assert [block.coder for block in blocks] == ["prior", "static", "prior"]
    assert file.num_fallbacks == 1
    assert torch.equal(decompress(model, file.content, COUNTS).codes, codes)


def test_a_file_whose_blocks_all_fell_back_needs_no_prior(drifting_model, codes, names):
    drifting = drifting_model(0.5, {1, 3, 5})
    file = compress(drifting, codes, names, lanes=4)
    assert file.num_fallbacks == 3
    assert read_container(file.content)[0].layout is None
    drifting.prior.drifts_at = range(100)
    assert torch.equal(decompress(drifting, file.content).codes, codes)


def test_a_machine_that_computes_otherwise_refuses_and_names_the_way_out(drifting_model, model, codes, names):
    file = compress(model, codes, names)
    with pytest.raises(CodecError, match="--portable"):
        decompress(drifting_model(1e-5, range(100)), file.content)


def test_a_portable_file_needs_no_machine_that_computes_alike(drifting_model, model, codes, names):
    file = compress(model, codes, names, code_counts=COUNTS, portable=True)
    assert torch.equal(decompress(drifting_model(0.5, range(100)), file.content, COUNTS).codes, codes)


def test_codes_that_differ_after_the_canary_are_damage_and_not_an_image(drifting_model, model, codes, names):
    file = compress(model, codes, names, lanes=4)
    drifting = drifting_model(0.5, {2})  # the canary, the first block, the second
    back = decompress(drifting, file.content)
    assert len(back.damage) == 1
    assert back.damage[0].startswith("block 2 of 3 (images 5 to 8): ")
    assert torch.equal(back.codes, torch.cat([codes[:4], codes[8:]]))


@pytest.mark.parametrize("portable", [False, True], ids=["prior", "portable"])
def test_a_damaged_block_is_named_and_all_others_come_back(model, codes, names, portable):
    file = compress(model, codes, names, portable=portable, lanes=4)
    content = bytearray(file.content)
    payload = read_container(file.content)[2][1].payload
    content[file.content.index(payload) + 1] ^= 8
    back = decompress(model, bytes(content))
    assert back.damage == ["block 2 of 3 (images 5 to 8): its checksum is wrong, so its bytes were altered"]
    assert back.names == names[:4] + names[8:]
    assert torch.equal(back.codes, torch.cat([codes[:4], codes[8:]]))


def test_a_file_with_no_intact_block_gives_no_image(model, codes, names):
    content = compress(model, codes, names, lanes=11).content
    header = int.from_bytes(content[8:12], "little")
    back = decompress(model, content[: 16 + header])
    assert back.names == []
    assert back.codes.shape == (0, 4, 4)
    assert len(back.damage) == 1


def test_another_model_is_refused_by_what_is_different(model, codes, names):
    file = compress(model, codes, names, code_counts=COUNTS)
    other = copy.deepcopy(model)
    other.prior.head[3].bias.data[0] += 1
    with pytest.raises(CodecError, match="another prior"):
        decompress(other, file.content, COUNTS)
    other.vqvae.quantizer.codebook[0] += 1
    with pytest.raises(CodecError, match="another tokenizer"):
        decompress(other, file.content, COUNTS)
    with pytest.raises(CodecError, match="another static table"):
        decompress(model, file.content)


def test_another_precision_of_the_weights_is_refused(model, codes, names):
    file = compress(model, codes, names)
    with pytest.raises(CodecError, match="float32: here it is torch.float64"):
        decompress(copy.deepcopy(model).double(), file.content)


def test_blocks_do_not_depend_on_each_other(model, codes, names):
    """The codes of a block are coded alike whatever stands in the other blocks."""
    other = torch.cat([codes[:4], 7 - codes[4:8], codes[8:]])
    mine, theirs = (
        [block.payload for block in read_container(compress(model, these, names, lanes=4).content)[2]]
        for these in (codes, other)
    )
    assert mine[0] == theirs[0]
    assert mine[1] != theirs[1]
    assert mine[2] == theirs[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.full((11, 4, 4), 8)}, r"in \[0, 8\)"),
        ({"codes": torch.zeros(11, 5, 5, dtype=torch.long)}, r"expected \(11, 4, 4\)"),
        ({"codes": torch.zeros(0, 4, 4, dtype=torch.long), "names": []}, "no images"),
        ({"lanes": 0}, "lanes is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"label": 9}, "class ids"),
        ({"code_counts": [1]}, "counts of 1 codes"),
    ],
    ids=["range", "shape", "empty", "lanes", "threads", "label", "counts"],
)
def test_bad_arguments_are_refused(model, codes, names, change, message):
    with pytest.raises(ValueError, match=message):
        compress(model, **({"codes": codes, "names": names} | change))


def test_progress_counts_every_image(model, codes, names):
    done = []
    file = compress(model, codes, names, lanes=4, on_block=done.append)
    decompress(model, file.content, on_block=done.append)
    assert done == [4, 4, 3] * 2
