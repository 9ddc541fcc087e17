"""tools/evaluate.py: FID equals its formula; CLIP score and aesthetics score are means of open_clip's own numbers."""
import json
import os
import sys

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import torch_fidelity
from PIL import Image
from scipy.linalg import sqrtm

from tools import evaluate


def rand(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(tmp_path):
    """-> a folder with samples/ (12 pictures of 40x40 pixels), real/ (12 of other sizes), prompts.txt (12 lines)."""
    for name, wider, seed in ("samples", 0, 0), ("real", 1, 100):
        (tmp_path / name).mkdir()
        for i in range(12):
            pixels = np.random.default_rng(seed + i).integers(0, 200 + i, (40 + wider * (i + 3), 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i:02d}.png")
    (tmp_path / "prompts.txt").write_text("".join(f"picture {i}\n" for i in range(12)))
    return tmp_path


@pytest.fixture
def measure(folder, monkeypatch, capsys):
    """-> measure(*words): runs tools.evaluate on samples/ with these arguments -> its last line, which is JSON."""
    def run_command(*words):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, (folder / "samples", "--device", "cpu", *words))])
        evaluate.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run_command


def quadrants(images):
    """images (N, 3, H, W) -> mean red of each quadrant (N, 4)."""
    return F.adaptive_avg_pool2d(images.float(), 2).flatten(1)[:, :4]


class SmallNetwork(torch_fidelity.FeatureExtractorBase):
    """Replaces Inception, so that no weights are downloaded."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("4",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "4"

    def forward(self, images):
        return quadrants(images),


def test_fid_is_the_frechet_distance_between_the_samples_and_the_real_pictures_at_their_size(folder, measure,
                                                                                             monkeypatch):
    torch_fidelity.register_feature_extractor("small", SmallNetwork)
    monkeypatch.setattr(evaluate, "FID_NETWORK", "small")
    a, b = (quadrants(torch.stack(list(evaluate.CroppedPictures(folder / name, (40, 40))))).double().numpy()
            for name in ("samples", "real"))
    A, B = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B - 2 * sqrtm(A @ B).real)
    found = measure("--real", folder / "real", "--batch", 5)
    assert found["fid"] == pytest.approx(expected, rel=1e-4) and found["images"] == 12
    assert measure("--real", folder / "samples")["fid"] == pytest.approx(0, abs=1e-3)


def test_pictures_are_centre_cropped_and_scaled_to_the_given_size_or_that_of_the_first_one(tmp_path):
    Image.new("RGB", (20, 10), "blue").save(tmp_path / "0.png")
    flag = np.zeros((40, 40, 3), np.uint8)
    flag[:10], flag[10:30], flag[30:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)       # the middle half is green
    Image.fromarray(flag).save(tmp_path / "1.png")
    cropped = evaluate.CroppedPictures(tmp_path)[1]
    assert cropped.shape == (3, 10, 20) and cropped.dtype == torch.uint8
    assert (cropped[1, 1:-1] > 250).all() and (cropped[[0, 2], 1:-1] < 5).all()
    assert evaluate.CroppedPictures(tmp_path, (8, 6))[1].shape == (3, 6, 8)


def named(folder, *names):
    """-> a new folder with pictures of these names."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / name)
    return folder


@pytest.mark.parametrize("names", [
    [f"{i}.png" for i in range(12)], [f"image_{i}.png" for i in range(8, 12)], ["00008.png", "00009.png", "00010.png"],
    ["step 9/2.png", "step 9/10.png", "step 10/1.png"], ["9_b.png", "10_a.jpg", "x.png", "y.png"]])
def test_prompts_are_matched_to_pictures_in_the_order_of_their_numbers(tmp_path, capsys, names):
    pictures = evaluate.CroppedPictures(named(tmp_path / "s", *names)).paths
    assert [str(path.relative_to(tmp_path / "s")) for path in pictures] == names
    (tmp_path / "prompts.txt").write_text("".join(f"{name}\n" for name in names))
    assert evaluate.read_prompts(tmp_path / "prompts.txt", pictures) == names
    assert f"'{names[0]}' for {pictures[0].name}, ..., '{names[-1]}' for {pictures[-1].name}" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["1.png", "01.png"], ["1.jpg", "1.png"], ["a/2.png", "a/02.webp", "a/3.png"]])
def test_prompts_for_pictures_of_one_number_are_refused(tmp_path, names):
    pictures = evaluate.CroppedPictures(named(tmp_path / "s", *names)).paths
    (tmp_path / "prompts.txt").write_text("x\n" * len(names))
    with pytest.raises(ValueError, match="prompts.txt: does .* come first"):
        evaluate.read_prompts(tmp_path / "prompts.txt", pictures)


def test_networks_for_which_open_clip_would_ask_a_hub_are_refused(tmp_path):
    """By open_clip's own list: those whose tokenizer or text network is not part of open_clip."""
    refused = {name for name in open_clip.list_models() if evaluate.hub_files(name, True)}
    for name in "roberta-ViT-B-32", "nllb-clip-base", "mt5-base-ViT-B-32", "ViT-B-16-SigLIP", "ViT-L-14-CLIPA":
        assert name in refused
    for name in sorted(set(open_clip.list_models()) - refused):
        assert isinstance(open_clip.get_tokenizer(name), open_clip.SimpleTokenizer), name
    assert not evaluate.hub_files("ViT-B-16-SigLIP", False) and evaluate.hub_files("roberta-ViT-B-32", False)
    assert not evaluate.hub_files("none", True)


@pytest.fixture
def small_clip(folder):
    """-> a random CLIP with BatchNorm, named small-clip, and its transform. Writes clip.pt and head.pt, the weights."""
    (folder / "configs").mkdir()
    (folder / "configs/small-clip.json").write_text(json.dumps({
        "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}))
    open_clip.add_model_config(folder / "configs")
    torch.manual_seed(0)
    network, _, transform = open_clip.create_model_and_transforms("small-clip")
    torch.save(network.state_dict(), folder / "clip.pt")
    torch.save({"layers.0.weight": rand(3, 16, seed=0), "layers.0.bias": rand(3, seed=1),
                "layers.2.weight": rand(1, 3, seed=2), "layers.2.bias": rand(1, seed=3)}, folder / "head.pt")
    return network.eval(), transform


def test_clip_score_and_aesthetics_are_means_over_pictures_of_open_clips_own_numbers(folder, measure, small_clip):
    network, transform = small_clip
    with torch.no_grad():
        pictures = [transform(Image.open(folder / f"samples/{i:02d}.png")) for i in range(12)]
        images = network.encode_image(torch.stack(pictures), normalize=True)
        texts = network.encode_text(open_clip.tokenize([f"picture {i}" for i in range(12)]), normalize=True)
    scores = (images @ rand(3, 16, seed=0).T + rand(3, seed=1)) @ rand(1, 3, seed=2).T + rand(1, seed=3)
    both = measure("--clip", "small-clip", folder / "clip.pt", "--prompts", folder / "prompts.txt",
                   "--aesthetics", folder / "head.pt", "--batch", 5)
    assert both["clip_score"] == pytest.approx((images * texts).sum(1).mean().item(), abs=1e-5)
    assert both["aesthetics_score"] == pytest.approx(scores.mean().item(), abs=1e-5)
    alone = measure("--clip", "small-clip", folder / "clip.pt", "--aesthetics", folder / "head.pt")
    assert alone["aesthetics_score"] == pytest.approx(both["aesthetics_score"], abs=1e-5) and "clip_score" not in alone


@pytest.mark.parametrize("words, error", [
    ("", "nothing to measure"), ("--real none", "none has 0 pictures"), ("--clip x w.pt", "goes with --prompts"),
    ("--prompts prompts.txt", "goes with"), ("--clip nllb-clip-base w.pt --prompts prompts.txt", "would download"),
    ("--clip x none.pt --prompts prompts.txt", "none.pt: no such file"),
    ("--real real --inception none.pth", "none.pth: no such file"), ("--real real --batch 0", "--batch 0"),
    ("--clip x w.pt --prompts short.txt", "1 lines for 12 pictures")])
def test_wrong_arguments_are_refused_before_anything_is_measured(folder, measure, monkeypatch, words, error):
    monkeypatch.chdir(folder)
    (folder / "short.txt").write_text("one\n")
    (folder / "w.pt").write_bytes(b"")
    monkeypatch.setattr(evaluate, "clip_results", lambda *_: pytest.fail("loaded CLIP before it failed"))
    monkeypatch.setattr(torch_fidelity, "calculate_metrics", lambda **_: pytest.fail("measured before it failed"))
    with pytest.raises(ValueError, match=error):
        measure(*words.split())


class Intruder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_of_weights_that_contains_code_is_refused_and_the_code_does_not_run(folder, measure):
    for name, content in ("code", Intruder(folder / "made")), ("module", torch.nn.Linear(1, 1)), ("list", [1, 2]):
        torch.save(content, folder / f"{name}.pth")
        for words in (["--real", folder / "real", "--inception", folder / f"{name}.pth"],):
            with pytest.raises(ValueError, match=f"{name}.pth: (not a file of plain tensors|it contains more)"):
                measure(*words)
        with pytest.raises(ValueError, match=f"{name}.pth: "):
            evaluate.aesthetics_predictor(folder / f"{name}.pth", 16)
    assert not (folder / "made").exists()


def test_weights_that_are_not_finite_are_refused(folder):
    torch.save({"0.weight": torch.tensor([[float("nan")]])}, folder / "nan.pth")
    with pytest.raises(ValueError, match="nan.pth: 0.weight has NaN or infinity"):
        evaluate.read_weights(folder / "nan.pth")


def test_weights_of_another_network_than_inception_are_refused_with_their_path(folder, measure):
    torch.save({"x": torch.ones(1)}, folder / "other.pth")
    with pytest.raises(ValueError, match="--inception .*other.pth: not the weights of torch-fidelity's"):
        measure("--real", folder / "real", "--inception", folder / "other.pth")


def test_weights_of_another_network_than_clip_or_its_predictor_are_refused_with_their_path(folder, measure, small_clip):
    words = "--clip", "small-clip", folder / "clip.pt", "--aesthetics"
    broken = {"deep": {"0.weight": torch.ones(1, 16, 1), "0.bias": torch.ones(1)}, "none": {"x": torch.ones(1)},
              "bare": {"0.weight": torch.ones(1, 16)}, "wide": {"0.weight": torch.ones(1, 9), "0.bias": torch.ones(1)},
              "two": {"0.weight": torch.ones(2, 16), "0.bias": torch.ones(2)}}
    for name, tensors in broken.items():
        torch.save(tensors, folder / f"{name}.pth")
        with pytest.raises(ValueError, match=f"{name}.pth: not linear layers from CLIP's 16 numbers to one score"):
            measure(*words, folder / f"{name}.pth")
    weights = torch.load(folder / "clip.pt", weights_only=True)
    weights.pop("ln_final.bias")
    torch.save(weights, folder / "part.pt")
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(folder / "script.pt"))
    torch.save(Intruder(folder / "made"), folder / "code.pt")
    for name, file, error in (
            ("small-clip", "part.pt", "part.pt: not the weights of that network"), ("x", "clip.pt", "has no network"),
            ("small-clip", "script.pt", "script.pt: a TorchScript archive.*use open_clip's .safetensors"),
            ("small-clip", "code.pt", "code.pt: not a file of plain tensors"), ("hf-hub:a/b", "clip.pt", "downloaded")):
        with pytest.raises(ValueError, match=error):
            measure("--clip", name, folder / file, "--aesthetics", folder / "head.pt")
    assert not (folder / "made").exists()
