"""Networks that embed: modules only, no training and no data.

All keep one contract: ``network(x) -> (y, z)``, where y (B, n_components) is the embedding, and z
what the loss compares; ``network.embed(x)`` gives y, ``network.head(y)`` gives z.
"""

import copy
import inspect
import itertools
import json
import math
import os
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["DINOHead", "EmbeddingMLP", "ImageEmbedder", "Linear", "mlp_head", "norm_groups"]

# Fewer output columns than this, and a CPU's matrix product may round a row by its place.
_EVEN_COLUMNS = 16
# Of what blocks beside a skip would have alone, the share with which they begin.
_FIRST_SHARE = 0.1


class Linear(nn.Linear):
    """Linear layer that embeds a row the same, bit for bit, wherever it stands in a batch.

    On some processors (AMD's, with MKL) the matrix product takes rows by fours where it has 2 to 11
    output columns, and rounds the first of them otherwise than the rest: a map of two columns moved
    by 1e-7 with the rows around. Outside training such a layer is widened by columns of zeros.

    Examples
    --------
    >>> import torch
    >>> layer, x = Linear(64, 2).eval(), torch.randn(1, 64)
    >>> bool((layer(x.repeat(9, 1)) == layer(x.repeat(9, 1))[:1]).all())
    True
    """

    def forward(self, x):  # noqa: D102
        n = self.out_features
        if self.training or n >= _EVEN_COLUMNS or x.is_cuda:
            return super().forward(x)
        missing = _EVEN_COLUMNS - n
        bias = None if self.bias is None else F.pad(self.bias, (0, missing))
        return F.linear(x, F.pad(self.weight, (0, 0, 0, missing)), bias)[..., :n]


def norm_groups(*widths):
    """Give the groups of a GroupNorm that serves layers of all these widths: 32, or fewer.

    Of at least four channels each, two in narrow layers: where every channel has a norm of its own,
    the last layers before the pixels forget how bright an image is.

    Examples
    --------
    >>> norm_groups(128, 256), norm_groups(32, 64), norm_groups(12)
    (32, 8, 2)
    """
    shared = math.gcd(*widths)
    return max(n for n in (1, 2, 4, 8, 16, 32) if shared % (n * min(4, n)) == 0)


class EmbeddingMLP(nn.Module):
    """Encoder of DiffAug for vectors: features -> high-dimensional y -> low-dimensional z.

    Blocks of Linear, LeakyReLU(0.1) and BatchNorm1d, in this order, as in the released code
    (in -> 500 -> 500 -> 500 -> 50, then a head 50 -> 500 -> 500 -> 2; here the encoder has as many
    hidden layers as the head). Beside the blocks a linear skip, the identity at the start, carries
    the input to y: what a linear embedding of the input already tells apart is there from the first
    step, and the blocks learn what to add. A second skip starts z at the first `n_low` features:
    where these are principal components, the map starts from the large-scale arrangement that PCA
    shows, and keeps more of it, as t-SNE does from such a start. The released network has no skips,
    and BatchNorm behind z, which would fix the spread of the map.

    Parameters
    ----------
    n_features : int
        Width of a sample.
    n_components : int, default=50
        Width of y.
    n_low : int, default=2
        Width of z.
    hidden_sizes : tuple of int, default=(500, 500)
        Widths of the hidden layers, of the encoder and of the head alike.
    skip : bool, default=True
        Whether y and z get their linear skips.
    dropout : float, default=0.0
        Share of the units of each hidden layer between input and y that are left out, drawn anew
        for each row and step of training; the layers of the head from y to z keep all of theirs.
        With it the blocks beside the skip also begin at a tenth of their size, and y as what the
        skip carries: of few rows they would otherwise cover it with what holds for no other row.
    head : nn.Module or None, default=None
        Another way from y to z than the MLP to `n_low`; it has no skip.

    Examples
    --------
    >>> import torch
    >>> y, z = EmbeddingMLP(20)(torch.randn(8, 20))
    >>> tuple(y.shape), tuple(z.shape)
    ((8, 50), (8, 2))
    """

    def __init__(
        self,
        n_features,
        n_components=50,
        n_low=2,
        hidden_sizes=(500, 500),
        skip=True,
        dropout=0.0,
        head=None,
    ):
        super().__init__()
        self.n_components = n_components
        self.backbone = _blocks(n_features, *hidden_sizes, n_components)
        if dropout > 0:
            for block in self.backbone[:-1]:
                block.append(nn.Dropout(dropout))
            if skip:
                nn.init.constant_(self.backbone[-1][-1].weight, _FIRST_SHARE)
        self.head, low_skip = head, skip and head is None
        if head is None:
            last = hidden_sizes[-1] if hidden_sizes else n_components
            self.head = nn.Sequential(*_blocks(n_components, *hidden_sizes), Linear(last, n_low))
        self.skip = Linear(n_features, n_components, bias=False) if skip else None
        self.low_skip = Linear(n_features, n_low, bias=False) if low_skip else None
        if skip:
            nn.init.eye_(self.skip.weight)
        if low_skip:
            nn.init.eye_(self.low_skip.weight)
            with torch.no_grad():
                self.head[-1].weight.mul_(_FIRST_SHARE)
                self.head[-1].bias.zero_()

    def embed(self, x):
        """High-dimensional embedding y (B, n_components) of x (B, n_features)."""
        y = self.backbone(x)
        return y if self.skip is None else y + self.skip(x)

    def forward(self, x):
        """Both embeddings: y (B, n_components) and z (B, n_low)."""
        y = self.embed(x)
        z = self.head(y)
        return y, z if self.low_skip is None else z + self.low_skip(x)


def _blocks(*sizes):
    return nn.Sequential(
        *[
            nn.Sequential(Linear(n_in, n_out), nn.LeakyReLU(0.1), nn.BatchNorm1d(n_out))
            for n_in, n_out in itertools.pairwise(sizes)
        ]
    )


# ---- heads: from y to what the loss compares -----------------------------------------------------


def mlp_head(*sizes, norm_hidden=True, norm_last=False):
    """Projection or prediction head: Linear, BatchNorm, ReLU, ..., Linear.

    Parameters
    ----------
    *sizes : int
        Widths, from the input's to the output's.
    norm_hidden : bool, default=True
        BatchNorm behind the hidden layers; MoCo v2 has none.
    norm_last : bool, default=False
        BatchNorm without gain and bias behind the last layer (SimSiam's projection).

    Returns
    -------
    nn.Sequential

    Examples
    --------
    >>> import torch
    >>> tuple(mlp_head(16, 32, 8)(torch.randn(4, 16)).shape)
    (4, 8)
    """
    layers = []
    *hidden, (n_in, n_out) = itertools.pairwise(sizes)
    for before, after in hidden:
        layers.append(Linear(before, after, bias=not norm_hidden))
        layers += [nn.BatchNorm1d(after), nn.ReLU()] if norm_hidden else [nn.ReLU()]
    layers.append(Linear(n_in, n_out, bias=not norm_last))
    if norm_last:
        layers.append(nn.BatchNorm1d(n_out, affine=False))
    return nn.Sequential(*layers)


class DINOHead(nn.Module):
    """Projection head of DINO: MLP, L2-normalised bottleneck, weight-normalised prototypes.

    Three linear layers with GELU and no BatchNorm; the bottleneck is normalised to length 1, and so
    is the weight of each prototype where `norm_last` freezes its gain at 1 (the default of the
    authors' code), so that the logits are cosines.

    Parameters
    ----------
    n_features : int
        Width of the embedding.
    out_dim : int
        Prototypes K.
    hidden : int, default=2048
        Width of the hidden layers.
    bottleneck : int, default=256
        Width in front of the prototypes.
    norm_last : bool, default=True
        Freeze the gain of the last layer. It is steadier; without it large models learn more.
    norm_hidden : bool, default=False
        BatchNorm in the hidden layers, an option of the authors' code. On 500 digits it decided
        between learning and a collapse to the uniform distribution.

    References
    ----------
    Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021, appendix C.

    Examples
    --------
    >>> import torch
    >>> logits = DINOHead(16, 64, hidden=32)(torch.randn(4, 16))
    >>> tuple(logits.shape), bool((logits.abs() <= 1.0001).all())
    ((4, 64), True)
    """

    def __init__(
        self, n_features, out_dim, hidden=2048, bottleneck=256, norm_last=True, norm_hidden=False
    ):
        super().__init__()
        sizes = (n_features, hidden, hidden, bottleneck)
        layers = [Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(sizes)]
        between = [[nn.BatchNorm1d(hidden)] * norm_hidden + [nn.GELU()] for _ in range(2)]
        self.mlp = nn.Sequential(layers[0], *between[0], layers[1], *between[1], layers[2])
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.empty(out_dim, bottleneck))
        nn.init.kaiming_uniform_(self.prototypes, a=5**0.5)
        self.gain = None if norm_last else nn.Parameter(torch.ones(out_dim))

    def forward(self, y):
        """Logits (B, K) of embeddings y (B, n_features)."""
        z = F.linear(F.normalize(self.mlp(y), dim=-1), F.normalize(self.prototypes, dim=-1))
        return z if self.gain is None else z * self.gain


# ---- images --------------------------------------------------------------------------------------

FEATURES = ("auto", "cls", "pooled", "last_n")


class ImageEmbedder(nn.Module):
    """Image encoder: backbone -> features -> y (optionally a linear layer) -> head -> z.

    It takes images of any size, as far as the backbone does: crops of several sizes share it.

    Parameters
    ----------
    backbone : nn.Module
        A timm model without classifier, or any module from (B, C, H, W) to (B, F).
    n_features : int
        Width F of the features, see :func:`feature_width`.
    n_components : int or None, default=None
        Width of y; None takes the features as they are.
    head : nn.Module or None, default=None
        From y to z; None for z = y.
    features : {"auto", "cls", "pooled", "last_n"}, default="auto"
        What y is made of, see :func:`image_features`.
    n_last : int, default=4
        Blocks of ``"last_n"``, the four of DINO's linear protocol.
    scale : tuple (mean, std), each of one or C floats, or None, default=None
        Of the pixels in [-1, 1] by which the backbone's weights were trained.

    Examples
    --------
    >>> import torch
    >>> network = ImageEmbedder(small_resnet((8, 8, 1)), 128)
    >>> y, z = network(torch.zeros(2, 1, 8, 8))
    >>> tuple(y.shape), y is z
    ((2, 128), True)
    """

    def __init__(
        self,
        backbone,
        n_features,
        n_components=None,
        head=None,
        features="auto",
        n_last=4,
        scale=None,
    ):
        super().__init__()
        # Not saved with the weights: it is known from where they came.
        for name, values in zip(("mean", "std"), scale or (None, None), strict=True):
            values = None if values is None else torch.tensor(values).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.backbone, self.features, self.n_last = backbone, features, n_last
        narrow = n_components is not None
        self.n_components = n_components if narrow else n_features
        self.embedding = Linear(n_features, n_components) if narrow else nn.Identity()
        self.head = nn.Identity() if head is None else head

    def pixels(self, x):
        """Images in [-1, 1] as the backbone sees them."""
        return x if self.mean is None else (x - self.mean) / self.std

    def embed(self, x):
        """Embedding y (B, n_components) of images x (B, C, H, W)."""
        x = self.pixels(x)
        return self.embedding(image_features(self.backbone, x, self.features, self.n_last))

    def forward(self, x):
        """Both embeddings: y (B, n_components) and z, what the head makes of it."""
        y = self.embed(x)
        return y, self.head(y)


def image_features(backbone, x, features="auto", n_last=4):
    """Features of images by one of four readings of a backbone.

    Parameters
    ----------
    backbone : nn.Module
        Timm model or any module.
    x : Tensor of shape (B, C, H, W)
        Images.
    features : {"auto", "cls", "pooled", "last_n"}, default="auto"
        ``"auto"``: what the backbone returns, the CLS token of a ViT and pooled maps of a CNN.
        ``"cls"``: the CLS token. ``"pooled"``: mean of the patch tokens, or of the last map.
        ``"last_n"``: CLS tokens of the last `n_last` blocks, side by side.
    n_last : int, default=4
        Blocks of ``"last_n"``.

    Returns
    -------
    Tensor of shape (B, F)
    """
    if features == "auto":
        y = backbone(x)
        if not isinstance(y, torch.Tensor) or y.ndim != 2:
            shape = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
            raise ValueError(
                f"backbone must map images (B, C, H, W) to features (B, F), but gave {shape}. Pool "
                "its output; of a timm model, pass the name and let num_classes=0 do it."
            )
        return y
    vit = _is_vit(backbone)
    if features == "pooled":
        if vit:
            return backbone.forward_features(x)[:, backbone.num_prefix_tokens :].mean(1)
        if not hasattr(backbone, "forward_features"):
            return image_features(backbone, x)
        maps = backbone.forward_features(x)
        # Swin and a few others of timm have the channels last.
        sides = (1, 2) if getattr(backbone, "output_fmt", None) == "NHWC" else (2, 3)
        return maps.mean(sides) if maps.ndim == 4 else image_features(backbone, x)
    if not (vit and _has_cls_token(backbone)):
        raise ValueError(
            f"features={features!r} needs a vision transformer with a CLS token, but backbone is a "
            f"{type(backbone).__name__}. Use features='pooled' or 'auto'."
        )
    if features == "cls":
        return backbone.forward_features(x)[:, 0]
    if features != "last_n":
        raise ValueError(f"features={features!r} must be one of {', '.join(FEATURES)}.")
    if "return_prefix_tokens" not in inspect.signature(backbone.forward_intermediates).parameters:
        raise ValueError(
            f"features='last_n' needs the CLS token of several blocks, which a "
            f"{type(backbone).__name__} does not give. Use features='cls'."
        )
    layers = backbone.forward_intermediates(
        x,
        min(n_last, len(backbone.blocks)),
        return_prefix_tokens=True,
        norm=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    return torch.cat([prefix[:, 0] for _, prefix in layers], dim=1)


def feature_width(backbone, shape, features="auto", n_last=4):
    """Width of the features of a backbone for images of a shape (h, w, c).

    Found by a look at one image: `num_features` of timm is the width of the last maps, which is not
    that of the output where a model has layers behind the pooling (MobileNetV3) or a classifier.
    """
    training = backbone.training
    h, w, c = shape
    device = next((weight.device for weight in backbone.parameters()), None)
    x = torch.zeros(1, c, h, w, device=device)
    try:
        with torch.no_grad():
            return image_features(backbone.eval(), x, features, n_last).shape[1]
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"The backbone {type(backbone).__name__} cannot take images of shape "
            f"{tuple(x.shape)} (batch, channels, height, width): {error}"
        ) from error
    finally:
        backbone.train(training)


def make_backbone(backbone, shape, *, pretrained=None, drop_path=0.0, load=True, source=None):
    """Backbone for images of a shape, by name or as given.

    Parameters
    ----------
    backbone : str or nn.Module
        ``"small_resnet"``, ``"small_vit"``, a timm name (``"vit_small_patch16_224"``), or a module
        from (B, C, H, W) to (B, F), of which a copy is taken.
    shape : tuple of (int, int, int)
        Height, width and channels.
    pretrained : str, path-like or None, default=None
        Where weights come from: a file of safetensors or of a state dict (read by
        ``torch.load(weights_only=True)``: no code of it runs), the tag of timm's weights for
        this backbone, which timm downloads (``"dino"`` for ``vit_small_patch16_224.dino``; an empty
        string for its default), or ``"hf-hub:owner/name"`` or ``"local-dir:folder"``.
    drop_path : float, default=0.0
        Share of residual branches that are skipped in training.
    load : bool, default=True
        False makes the same architecture without reading the weights.
    source : dict or None, default=None
        What :func:`pretrained_source` gave.

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError
        For an unknown name, a file that does not fit, or a size that the model does not take.
    """
    import timm

    if isinstance(backbone, nn.Module):
        model = copy.deepcopy(backbone)
    elif backbone in SMALL_BACKBONES:
        model = SMALL_BACKBONES[backbone](shape, drop_path=drop_path)
    else:
        model = _timm_model(timm, backbone, shape, pretrained, drop_path, load, source)
    if load and pretrained is not None and not (_is_tag(pretrained) and _is_timm(timm, backbone)):
        _load_weights(model, pretrained)
    return model


def is_hub_name(pretrained):
    """Whether weights come with their architecture, from the Hugging Face Hub or a folder."""
    return isinstance(pretrained, str) and pretrained.startswith(_HUBS)


def pretrained_source(backbone, pretrained):
    """Tell what makes the network of pretrained weights without them, and the scale of pixels.

    Parameters
    ----------
    backbone : str or nn.Module
        As in :func:`make_backbone`.
    pretrained : str, path-like or None
        As in :func:`make_backbone`.

    Returns
    -------
    dict or None
        ``"architecture"``, a name of timm, ``"model_args"``, and ``"mean"`` and ``"std"`` of pixels
        in [0, 1]; None for files of weights, which do not tell.

    Raises
    ------
    ValueError
        For a tag that timm does not know, or a folder without ``config.json``.
    """
    import timm

    if is_hub_name(pretrained):
        config = _hub_config(pretrained)
        found = config.get("pretrained_cfg", config)  # of timm before 0.9 it was flat
        args = config.get("model_args", {})
        name = config["architecture"]
    elif pretrained is not None and _is_tag(pretrained) and _is_timm(timm, backbone):
        name, args = backbone.partition(".")[0], {}
        tagged = f"{name}.{pretrained}" if pretrained else backbone
        try:
            found = timm.models.get_pretrained_cfg(tagged).to_dict()
        except RuntimeError as error:
            tags = ", ".join(timm.list_pretrained(f"{name}.*")) or "none"
            raise ValueError(
                f"pretrained={pretrained!r} is no file, and no tag of timm's weights for "
                f"backbone={backbone!r}, of which there are: {tags}."
            ) from error
    else:
        return None
    mean, std = (list(map(float, found.get(key) or (0.5,))) for key in ("mean", "std"))
    return {"architecture": name, "model_args": dict(args), "mean": mean, "std": std}


def _hub_config(pretrained):
    """Read the ``config.json`` beside weights, in the layout of timm."""
    kind, _, place = pretrained.partition(":")
    if kind == "local-dir":
        path = Path(place).expanduser() / "config.json"
        if not path.is_file():
            raise ValueError(f"pretrained={pretrained!r}: there is no file {path}.")
    else:
        from huggingface_hub import hf_hub_download

        name, _, revision = place.partition("@")
        path = hf_hub_download(name, "config.json", revision=revision or None)
    config = json.loads(Path(path).read_text())
    if "architecture" not in config:
        raise ValueError(
            f"pretrained={pretrained!r} is no model of timm: its config.json names no architecture."
        )
    return config


def _timm_model(timm, name, shape, pretrained, drop_path, load, source):
    if not _is_timm(timm, name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
        raise ValueError(
            f"backbone={name!r} is neither 'small_resnet', 'small_vit', 'mlp', nor a model of timm"
            + (f" (some of its: {close})." if close else "; see timm.list_models().")
        )
    h, w, c = shape
    tag = pretrained is not None and _is_tag(pretrained)
    base = {"pretrained": tag and load, "in_chans": c, "num_classes": 0}
    if is_hub_name(pretrained) and load:
        name = pretrained
    elif is_hub_name(pretrained):
        base = source["model_args"] | base
    elif tag and pretrained:
        name = f"{name.partition('.')[0]}.{pretrained}"
    # Which options a family takes is known to its constructor only: from the most to the fewest.
    sized, paths = {"img_size": (h, w)}, {"drop_path_rate": drop_path}
    dynamic = {"dynamic_img_size": True, "dynamic_img_pad": True}
    for options in (sized | dynamic | paths, sized | paths, dynamic | paths, paths, {}):
        try:
            return timm.create_model(name, **base, **options)
        except TypeError:
            continue
        except (AssertionError, RuntimeError, ValueError) as error:
            if isinstance(error, OSError):  # of a download
                raise
            raise ValueError(
                f"backbone={name!r} cannot be made for images of {h} x {w} pixels (height x width) "
                f"with {c} channels: {str(error) or type(error).__name__}"
            ) from error
    raise ValueError(f"backbone={name!r} takes no in_chans={c}: choose another model of timm.")


def _is_timm(timm, name):
    return isinstance(name, str) and timm.is_model(name.partition(".")[0])


def _is_tag(pretrained):
    if is_hub_name(pretrained):
        return True
    text = os.fspath(pretrained)
    return not (Path(text).suffix in _WEIGHT_FILES or os.sep in text or Path(text).is_file())


_HUBS = ("hf-hub:", "local-dir:")
_WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def _load_weights(model, path):
    """Read a file of weights; nothing of it is executed."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(
            f"pretrained={os.fspath(path)!r} is no file, and no tag of timm's weights."
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        weights = load_file(path)
    else:
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"pretrained={os.fspath(path)!r} holds more than tensors, and is not read: it "
                "could run code. Save model.state_dict(), best with safetensors."
            ) from error
    # Checkpoints nest the weights, and name them after the wrapper that they were trained in.
    for key in ("teacher", "state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    weights = weights if isinstance(weights, dict) else {}
    own = model.state_dict()
    fewest = list(own)
    for prefix in ("", "module.", "backbone.", "module.backbone.", "encoder."):
        found = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        found = {k: v for k, v in found.items() if k in own and v.shape == own[k].shape}
        missing = [name for name in own if name not in found]
        if not missing:
            model.load_state_dict(found)
            return
        fewest = min(fewest, missing, key=len)
    raise ValueError(
        f"pretrained={os.fspath(path)!r} lacks {len(fewest)} of the {len(own)} weights of the "
        f"backbone, or has them in another shape: {', '.join(fewest[:3])}. Is it a file of the "
        "same architecture, input size and channels?"
    )


def small_resnet(shape, width=32, drop_path=0.0):
    """ResNet for images of 8 to 64 pixels that a CPU trains: timm's, narrow, with a CIFAR stem.

    One BasicBlock per stage, each stage twice as wide as the one before and, from the second on,
    half as large; a 3 x 3 stem of stride 1 (2 above 64 pixels) without max-pooling. There are four
    stages from 16 pixels on, three from 8, two from 4, else one: a map of one pixel is not halved
    (gradients of that are wrong in oneDNN's bf16, of torch 2.15: it reads memory that is not its
    own).

    Parameters
    ----------
    shape : tuple of (int, int, int)
        Height, width and channels.
    width : int, default=32
        Channels of the first stage.
    drop_path : float, default=0.0
        Share of residual branches skipped in training.

    Returns
    -------
    nn.Module
        From (B, C, H, W), any H and W, to (B, 8 * width), or 4, 2, 1 times the width.

    Examples
    --------
    >>> import torch
    >>> tuple(small_resnet((32, 32, 3))(torch.zeros(2, 3, 16, 16)).shape)
    (2, 256)
    """
    from timm.models.resnet import BasicBlock, ResNet

    h, w, channels = shape
    stages = sum(max(h, w) >= side for side in (1, 4, 8, 16))
    widths = tuple(width * 2**i for i in range(stages))
    model = ResNet(
        BasicBlock,
        (1,) * stages if stages > 1 else (2,),
        num_classes=0,
        in_chans=channels,
        channels=widths,
        stem_width=width,
        drop_path_rate=drop_path,
    )
    first = model.conv1.out_channels
    stride = 2 if max(h, w) > 64 else 1
    model.conv1 = nn.Conv2d(channels, first, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    for stage in range(stages, 4):
        setattr(model, f"layer{stage + 1}", nn.Identity())
    return model


def small_vit(shape, width=192, depth=6, heads=3, drop_path=0.0):
    """Vision transformer for images of 8 to 64 pixels: timm's, 192 wide, 6 deep, 3 heads.

    Patches are 2 x 2 up to 16 pixels, 4 x 4 up to 64, 16 x 16 above 128 and 8 x 8 between. Other
    sizes than `shape` are padded to whole patches, with interpolated positions.

    Parameters
    ----------
    shape : tuple of (int, int, int)
        Height, width and channels.
    width, depth, heads : int, default=192, 6, 3
        Size of the transformer.
    drop_path : float, default=0.0
        Share of residual branches skipped in training.

    Returns
    -------
    nn.Module
        From (B, C, H, W) to the CLS token (B, width).

    Examples
    --------
    >>> import torch
    >>> tuple(small_vit((32, 32, 3), depth=1)(torch.zeros(2, 3, 16, 16)).shape)
    (2, 192)
    """
    from timm.models.vision_transformer import VisionTransformer

    h, w, channels = shape
    patch = next(p for p, most in ((2, 16), (4, 64), (8, 128), (16, 2**31)) if max(h, w) <= most)
    return VisionTransformer(
        img_size=(-(-h // patch) * patch, -(-w // patch) * patch),
        patch_size=patch,
        in_chans=channels,
        num_classes=0,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        drop_path_rate=drop_path,
        dynamic_img_size=True,
        dynamic_img_pad=True,
    )


SMALL_BACKBONES = {"small_resnet": small_resnet, "small_vit": small_vit}


def _is_vit(backbone):
    return all(hasattr(backbone, name) for name in ("blocks", "patch_embed", "num_prefix_tokens"))


def _has_cls_token(backbone):
    # Relatives of timm's VisionTransformer (BEiT, EVA, DINOv3) do not say it: they have one or not.
    has = getattr(backbone, "cls_token", None) is not None
    return getattr(backbone, "has_class_token", has)


def patch_size(backbone):
    """Side (h, w) of the patches of a vision transformer, or None for other backbones."""
    if not _is_vit(backbone):
        return None
    size = backbone.patch_embed.patch_size
    return (size, size) if isinstance(size, int) else tuple(int(side) for side in size)


def patch_tokens(backbone, x):
    """Patch tokens (B, L, F) of a vision transformer behind its last norm, row by row.

    Raises
    ------
    ValueError
        If the backbone is no vision transformer.
    """
    _check_vit(backbone, "patch_tokens")
    return backbone.forward_features(x)[:, backbone.num_prefix_tokens :]


def class_attention(backbone, x, layer=-1):
    """Attention of the CLS token to the patches, after the softmax over all tokens.

    Parameters
    ----------
    backbone : nn.Module
        Timm vision transformer with a CLS token.
    x : Tensor of shape (B, C, H, W)
        Images.
    layer : int, default=-1
        Block, from the first (0) or the last (-1).

    Returns
    -------
    Tensor of shape (B, heads, h, w)
        h and w in patches. What is missing to a sum of 1 goes to the CLS token itself and to
        registers.

    Raises
    ------
    ValueError
        If the backbone is no vision transformer with a CLS token and timm's plain attention, or has
        no such block.
    """
    from timm.models.vision_transformer import Attention

    _check_vit(backbone, "attention_maps")
    if not _has_cls_token(backbone):
        raise ValueError("attention_maps needs a CLS token, which this backbone does not have.")
    n_blocks = len(backbone.blocks)
    if not -n_blocks <= layer < n_blocks:
        raise ValueError(f"layer={layer} must be from {-n_blocks} to {n_blocks - 1}.")
    attention = getattr(backbone.blocks[layer], "attn", None)
    if not isinstance(attention, Attention):
        raise ValueError(
            f"attention_maps knows timm's plain attention, but the blocks of this "
            f"{type(backbone).__name__} have another: take its patch_tokens, or a model of timm's "
            "VisionTransformer."
        )
    seen = []

    def record(module, inputs):
        tokens = inputs[0]
        n, length, _ = tokens.shape
        qkv = module.qkv(tokens).reshape(n, length, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
        queries, keys = module.q_norm(qkv[0][:, :, :1]), module.k_norm(qkv[1])
        seen.append((queries * module.scale @ keys.transpose(-2, -1)).softmax(-1)[:, :, 0])

    handle = attention.register_forward_pre_hook(record)
    try:
        backbone.forward_features(x)
    finally:
        handle.remove()
    maps = seen[0][:, :, backbone.num_prefix_tokens :]
    return maps.unflatten(-1, backbone.patch_embed.dynamic_feat_size(x.shape[-2:]))


def _check_vit(backbone, what):
    if not _is_vit(backbone):
        raise ValueError(
            f"{what} needs a vision transformer, but backbone is a {type(backbone).__name__}: "
            "fit with backbone='small_vit' or another ViT of timm."
        )
