#!/bin/sh
# Every system of train/recipes that no shipped model comes from, with a short schedule, and the table of them all:
#
#     sh benchmarks/systems.sh PHOTOGRAPHS TEST_SETS OUT
#
# PHOTOGRAPHS: a folder. TEST_SETS: one with Set5, Set14 and BSD100 in it. OUT: for runs and bundles; what is finished
# is not made again. SR_WEIGHTS_DIR names the pretrained weights; of VGG, here those of VGG-19 up to relu3_1.
set -eu
photographs=$1 tests=$2 out=$3
mkdir -p "$out"

stage() { # epochs, rate
    echo "stages=[{name=\"64\",size=64,batch=8,phases=[{epochs=$1,learning_rate=$2}]}]"
}

train() { # recipe, options
    recipe=$1
    shift
    sr-train "$photographs" --recipe "$recipe" --out "$out/$recipe" "$@"
    test -d "$out/$recipe-short" || sr-export "$out/$recipe" --out "$out/$recipe-short" --fp16
}

# The U-Net's recipes damage their pictures; the test sets are clean. Unquoted below, as it is several words.
clean="--set degrade.jpeg_probability=0.0 --set degrade.noise_probability=0.0
    --set degrade.holes_probability=0.0 --set degrade.text_probability=0.0"

train unet-mse $clean --set "$(stage 16 1e-3)"
train perceptual-unet $clean --init "$out/unet-mse" --set "$(stage 4 2e-4)" \
    --set loss.feature_net=vgg19_normalised --set 'loss.feature_layers=["relu1_2","relu2_2","relu3_1"]' \
    --set 'loss.feature_weights=[1.0,1.0,1.0]' --set loss.feature_weight=0.1 --set loss.style_weight=20.0
train unet-gan $clean --set 'stages=[{name="64",size=64,batch=8,phases=[
    {name="content",epochs=6.0,learning_rate=1e-3},
    {name="critic",kind="critic",epochs=3.0,learning_rate=5e-4},
    {name="together",kind="adversarial",epochs=3.0,learning_rate=1e-4}]}]'
train unet-transpose --set "$(stage 16 3e-4)"
train resnet18-residual --set "$(stage 16 1e-3)"
train autoencoder --set "$(stage 16 1e-3)"
train vae --set "$(stage 24 1e-3)"
train srgan-mse --set "$(stage 0.5 3e-4)"
train srgan --init "$out/srgan-mse" \
    --set loss.feature_net=vgg19_normalised --set 'loss.feature_layers=["conv3_1"]' \
    --set 'loss.feature_weights=[1.0]' \
    --set 'stages=[{name="64",size=64,batch=8,phases=[{epochs=0.25,learning_rate=1e-4,kind="adversarial"}]}]'

set --
for bundle in "$out"/*-short; do
    set -- "$@" --model "$bundle"
done
sr-bench quality "$tests/Set5" "$tests/Set14" "$tests/BSD100" "$@" --json "$out/systems.json"
