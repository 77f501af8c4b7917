"""RobustBench's classifiers that are not built like ours: an example of --script, for networks of others.

    python eval_autoattack.py FILE.pt --script experiments/robustbench_models.py --arch preact-resnet-18 \\
        --dataset cifar10
    python experiments/dimensions.py FILE.pt --script experiments/robustbench_models.py --arch wrn-28-10 \\
        --dataset cifar10

Whoever asks for a network gives the name of a script, and the script has `build_model(arch, num_classes,
dataset)`. That is all. The network takes images in [0, 1], names its parameters as the file does, and has
`features` and `head` for the analyses. (`Classifier` makes them of `penultimate` and `head`.)

    wrn-DEPTH-WIDTH      the original WideResNet, conv1, block1.layer.0.conv1, ...: RobustBench's Standard and
                         many others. Files with init_conv, layer.0.block.0... (RobustBench's DMWideResNet,
                         and DM-AT's own) load without this script.
    wrn-DEPTH-WIDTH-sub  the same in files that come from the code of TRADES: it makes the first group twice
                         and uses it once, so there is a sub_block1 that does nothing
    preact-resnet-18     PreAct-ResNet-18 with SiLU, conv_2d, layer_0.0.batchnorm_0, ..., logits: the R18
                         files of Rebuffi et al., Gowal et al. and Rade in RobustBench (DMPreActResNet), and
                         DM-AT's code, whose names begin with module.0. Swish, as some call the activation, is
                         SiLU, x sigmoid(x).
    resnet-18            ResNet-18 for 32 px, conv1, layer1.0.conv1, ..., linear. The package pyautoattack has
                         one, not ours and ready to try:

    PTH=$(python -c "import pyautoattack; print(pyautoattack.__path__[0])")/examples/model_test.pt
    python eval_autoattack.py $PTH --script experiments/robustbench_models.py --arch resnet-18 \\
        --dataset cifar10 --n 50 --attacks apgd-ce apgd-t --out runs/resnet-18

How do images have to be normalised? Where a file says it, as mean and std or as mu and sigma, that holds
(`load_classifier`). Most files do not, and a wrong guess makes a bad classifier, not an error. The networks
of DM-AT and of Rebuffi et al. take the data set's mean and deviation, most others [0, 1] as it is. For one
that does not, change NORMALISATION in a copy of this script, and compare clean accuracy with RobustBench's.
"""
import re

import torch.nn.functional as F
from torch import nn

# Found because whoever runs this script has imported that one before.
from train_cifar import DATASETS, Classifier

NORMALISATION = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # mean and deviation per channel; 0.5 everywhere: 2x - 1


class WideBlock(nn.Module):
    """Pre-activation residual block, [B, in, H, W] -> [B, out, H / stride, W / stride]."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x):
        activated = F.relu(self.bn1(x))
        h = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return h + (self.convShortcut(activated) if hasattr(self, "convShortcut") else x)


class WideResNet(Classifier):
    """Zagoruyko & Komodakis's WRN-depth-width with the names of its first PyTorch version. What differs from
    DM-AT's: ReLU, and strided convolutions that are padded on all sides."""

    def __init__(self, depth, width, num_classes, unused_copy=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        channels, count = [16, 16 * width, 32 * width, 64 * width], (depth - 4) // 6
        for name in ["block1", "block2", "block3"] + unused_copy * ["sub_block1"]:
            before, after = channels[int(name[-1]) - 1:][:2]
            group = nn.Module()  # an empty shell for the name block1.layer.0
            group.layer = nn.Sequential(WideBlock(before, after, 1 if name[-1] == "1" else 2),
                                        *(WideBlock(after, after, 1) for _ in range(count - 1)))
            self.add_module(name, group)
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], num_classes)

    def penultimate(self, x):
        """[B, 3, 32, 32] normalised -> [B, 64 * width]"""
        x = self.conv1(x)
        for group in (self.block1, self.block2, self.block3):
            x = group.layer(x)
        return F.relu(self.bn1(x)).mean(dim=(2, 3))

    def head(self, features):
        return self.fc(features)


class PreActBlock(nn.Module):
    """Pre-activation residual block, [B, in, H, W] -> [B, out, H / stride, W / stride].

    Two things are not as one expects: the shortcut is a convolution of 3x3, not of 1x1, and it gets x itself,
    not the normalised and activated x. With the latter a file would load, and the network would be wrong.
    """

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(out_channels)
        self.conv_2d_1 = nn.Conv2d(in_channels, out_channels, 3, stride, bias=False)
        self.conv_2d_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        # A strided convolution is padded on the right and at the bottom alone: "SAME" padding of TensorFlow,
        # as in DM-AT's WideResNets.
        self.pad = nn.ZeroPad2d(1 if stride == 1 else (0, 1, 0, 1))
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 3, stride, bias=False)

    def forward(self, x):
        h = self.conv_2d_1(self.pad(F.silu(self.batchnorm_0(x))))
        h = self.conv_2d_2(F.silu(self.batchnorm_1(h)))
        return h + (self.shortcut(self.pad(x)) if hasattr(self, "shortcut") else x)


class PreActResNet18(Classifier):
    """He et al.'s PreAct-ResNet-18 for 32 px, as Rebuffi et al. and DM-AT build it: 12.5M parameters, more
    than the usual 11.2M, since three shortcuts are convolutions of 3x3."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv_2d = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        for i, (before, after) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)]):
            blocks = PreActBlock(before, after, 1 if i == 0 else 2), PreActBlock(after, after, 1)
            self.add_module(f"layer_{i}", nn.Sequential(*blocks))
        self.batchnorm = nn.BatchNorm2d(512)
        self.logits = nn.Linear(512, num_classes)

    def penultimate(self, x):
        """[B, 3, 32, 32] normalised -> [B, 512]"""
        x = self.layer_3(self.layer_2(self.layer_1(self.layer_0(self.conv_2d(x)))))
        return F.silu(self.batchnorm(x)).mean(dim=(2, 3))

    def head(self, features):
        return self.logits(features)


class BasicBlock(nn.Module):
    """Residual block, [B, in, H, W] -> [B, out, H / stride, W / stride]."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out_channels), nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                                          nn.BatchNorm2d(out_channels))

    def forward(self, x):
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


class ResNet18(Classifier):
    """He et al.'s ResNet-18 as it is usual for 32 px: a first convolution of 3x3, and no pooling after it."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        for i, (before, after) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], start=1):
            blocks = BasicBlock(before, after, 1 if i == 1 else 2), BasicBlock(after, after, 1)
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.linear = nn.Linear(512, num_classes)

    def penultimate(self, x):
        """[B, 3, 32, 32] normalised -> [B, 512]"""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3))

    def head(self, features):
        return self.linear(features)


def build_model(arch, num_classes, dataset="cifar10"):
    """A classifier for images [B, 3, 32, 32] in [0, 1], see above. Raises ValueError for another arch."""
    wrn, normalisation = re.fullmatch(r"wrn-(\d+)-(\d+)(-sub)?", arch), NORMALISATION
    if wrn and int(wrn[1]) >= 10 and int(wrn[1]) % 6 == 4 and int(wrn[2]) > 1:
        model = WideResNet(int(wrn[1]), int(wrn[2]), num_classes, unused_copy=bool(wrn[3]))
    elif arch == "preact-resnet-18":
        model, normalisation = PreActResNet18(num_classes), (DATASETS[dataset].mean, DATASETS[dataset].std)
    elif arch == "resnet-18":
        model = ResNet18(num_classes)
    else:
        raise ValueError(f"--arch {arch}: expected resnet-18, preact-resnet-18, or wrn-DEPTH-WIDTH with "
                         "DEPTH = 6n + 4, or wrn-DEPTH-WIDTH-sub")
    model.set_normalisation(*normalisation)
    return model
