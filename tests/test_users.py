"""Which tests make impossible what people run into with other tools (the list of shared/design/USERS.md)."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Complaint:
    """What users of other tools complain about, and the tests that fail where it can happen here.

    missing: what the runtime does not have yet, and no test therefore holds.
    """

    text: str
    tests: tuple[str, ...] = ()
    missing: str = ""


COMPLAINTS = {
    1: Complaint(
        "installation breaks",
        (
            "test_packaging.py::test_the_base_installation_is_three_packages",
            "test_packaging.py::test_the_two_onnxruntimes_never_meet",
            "test_sdk_imports.py::test_import_needs_no_engine_no_torch_no_cli_library",
            "test_sdk_imports.py::test_numpy_pillow_and_one_engine_are_enough",
            "test_architecture.py::test_the_runtime_stands_on_numpy_and_pillow",
        ),
    ),
    2: Complaint(
        "FP16 asked for, FP32 engine written",
        (
            "test_export_bundle.py::test_the_fp16_graph_convolves_in_half_precision",
            "test_sdk_backends.py::test_fp16_is_refused_where_it_would_be_computed_in_fp32",
        ),
        missing="the TensorRT backend: its engine inspector is not asked, because no engine is built",
    ),
    3: Complaint(
        "black or NaN pictures in FP16",
        (
            "test_export_bundle.py::test_parity_failure_names_stage_precision_picture_and_place",
            "test_export_bundle.py::test_weights_beyond_half_precision_are_refused",
            "test_sdk_upscaler.py::test_nan_from_an_engine_is_an_error",
            "test_sdk_stress.py::test_nan_is_an_error_that_names_the_stage_and_the_way_out",
            "test_sdk_cuda.py::test_an_fp16_engine_that_makes_black_is_refused",
        ),
    ),
    4: Complaint(
        "out of memory although tiling is on",
        (
            "test_sdk_stress.py::test_too_little_memory_halves_the_batch_then_the_tile",
            "test_sdk_stress.py::test_a_window_that_does_not_fit_is_cut",
            "test_sdk_cuda.py::test_too_little_memory_halves_the_batch_then_the_window",
            "test_sdk_stress.py::test_memory_that_is_short_for_a_while",
            "test_sdk_stress.py::test_a_tile_that_did_not_fit_is_not_tried_again",
            "test_sdk_stress.py::test_memory_does_not_grow_with_the_number_of_pictures",
            "test_sdk_large.py::test_memory_stays_flat",
        ),
    ),
    5: Complaint(
        "seams",
        (
            "test_sdk_seams.py::test_tiled_equals_untiled_with_the_strided_network",
            "test_sdk_seams.py::test_shipped_models_tiled_equal_untiled",
            "test_sdk_seams.py::test_shipped_models_show_a_quarter_of_the_halo",
            "test_sdk_seams.py::test_the_perceptual_unet_tiled_equals_untiled",
            "test_sdk_seams.py::test_tiles_off_the_grid_show",
            "test_sdk_seams.py::test_fast_seams_show_no_step",
        ),
    ),
    6: Complaint(
        "minutes of silence while an engine builds",
        ("test_sdk_upscaler.py::test_warmup_runs_without_counting",),
        missing="the TensorRT backend: no engine is built, so there is no progress bar and no lock",
    ),
    7: Complaint(
        "an engine from another GPU or version crashes",
        ("test_sdk_backends.py::test_openvino_survives_damaged_compiled_models",),
        missing="the TensorRT backend: no engine is kept, so there is no key and no header",
    ),
    8: Complaint(
        "only sizes inside a profile work",
        (
            "test_sdk_backends.py::test_shape_dtype_batch_and_determinism",
            "test_sdk_seams.py::test_shipped_models_at_odd_sizes",
        ),
        missing="the TensorRT backend and its profiles; the engines that are there take every size",
    ),
    9: Complaint(
        "GPU asked for, CPU used in silence",
        (
            "test_sdk_backends.py::test_cuda_is_never_replaced_in_silence",
            "test_sdk_backends.py::test_a_provider_that_falls_back_is_refused",
            "test_sdk_cuda.py::test_a_provider_that_does_not_load_is_told",
            "test_sdk_backends.py::test_precisions_are_never_replaced_in_silence",
        ),
    ),
    10: Complaint(
        "colours shift, ICC profile lost",
        (
            "test_sdk_files.py::test_profile_and_exif_are_kept_between_formats",
            "test_sdk_pixels.py::test_pil_pictures_keep_profile_and_exif",
            "test_sdk_pixels.py::test_a_constant_colour_is_kept",
            "test_sdk_seams.py::test_shipped_models_keep_the_mean_colour",
        ),
    ),
    11: Complaint(
        "pictures come out rotated",
        (
            "test_sdk_files.py::test_orientation_is_applied_and_reset",
            "test_sdk_large.py::test_orientation_is_applied",
        ),
    ),
    12: Complaint(
        "black fringes and jagged edges with alpha",
        (
            "test_sdk_pixels.py::test_hidden_colour_makes_no_fringe",
            "test_sdk_pixels.py::test_varying_alpha_goes_through_the_network",
            "test_sdk_upscaler.py::test_resizing_keeps_16_bits_and_hides_invisible_colour",
        ),
    ),
    13: Complaint(
        "16-bit guessed from the values, greyscale refused",
        (
            "test_sdk_pixels.py::test_every_form_comes_back_as_it_was",
            "test_sdk_pixels.py::test_16_bit_ramp_keeps_its_levels",
            "test_sdk_files.py::test_16_bit_grey_files_stay_16_bit",
            "test_sdk_files.py::test_16_bit_colour_files_stay_16_bit",
            "test_sdk_imports.py::test_a_dark_16_bit_picture_is_a_16_bit_picture",
        ),
    ),
    14: Complaint(
        "audio drifts, frames are dropped",
        (
            "test_sdk_video.py::test_sound_is_copied_bit_by_bit_and_in_time",
            "test_sdk_video.py::test_subtitles_are_copied",
            "test_sdk_video.py::test_a_frame_lost_on_the_way_is_an_error",
            "test_sdk_video_parts.py::test_timestamps_of_a_variable_frame_rate_are_kept",
        ),
    ),
    15: Complaint(
        "not thread-safe, pictures of two callers mix",
        (
            "test_sdk_stress.py::test_eight_threads_of_fifty_pictures_get_what_one_gets",
            "test_sdk_stress.py::test_batches_from_eight_threads_are_what_one_gets",
            "test_sdk_cuda.py::test_eight_threads_share_two_lanes",
            "test_sdk_backends.py::test_eight_threads_get_what_one_gets",
            "test_sdk_stress.py::test_upscale_many_in_several_threads",
        ),
    ),
    16: Complaint(
        "models are pickles",
        (
            "test_sdk_imports.py::test_nothing_of_the_runtime_unpickles",
            "test_sdk_bundle.py::test_file_names_stay_inside_the_bundle",
            "test_sdk_onnx_locations.py::test_a_bundle_that_reaches_outside_is_refused_before_any_engine",
        ),
    ),
    17: Complaint(
        "a failed tile is pasted over, half a file is left behind",
        (
            "test_sdk_stress.py::test_a_failed_tile_fails_the_picture_and_no_other",
            "test_sdk_stress.py::test_a_failed_frame_leaves_no_file",
            "test_sdk_stress.py::test_of_many_the_failed_one_is_an_error_and_the_others_are_right",
            "test_sdk_stress.py::test_a_kill_leaves_whole_files_only",
            "test_sdk_stress.py::test_ctrl_c_ends_at_once_and_keeps_finished_files",
            "test_sdk_files.py::test_a_full_disk_leaves_nothing",
        ),
    ),
    18: Complaint(
        "slow: one tile at a time, decode and encode in series",
        (
            "test_sdk_stress.py::test_steps_run_beside_each_other",
            "test_sdk_stress.py::test_windows_run_in_batches",
            "test_sdk_upscaler.py::test_a_batch_of_frames_is_what_each_gives_alone",
            "test_sdk_cuda.py::test_tiles_run_in_lanes",
            "test_sdk_cuda.py::test_two_gpus_share_the_windows",
        ),
    ),
    19: Complaint(
        "resuming forgets the epoch, the schedule, the random state or the sampler",
        (
            "test_train_cli.py::test_a_killed_run_goes_on_bit_for_bit",
            "test_train_loop.py::test_a_stopped_and_resumed_run_is_the_run_that_was_not",
            "test_train_adversary.py::test_a_stopped_run_goes_on_as_if_it_had_not",
            "test_train_checkpoint.py::test_a_kill_between_the_renames_loses_nothing",
            "test_systems.py::test_a_recipe_trains_exports_and_runs",
        ),
    ),
    20: Complaint(
        "editing the learning rate on resume has no effect",
        (
            "test_train_cli.py::test_a_learning_rate_edited_between_is_told",
            "test_train_cli.py::test_the_effective_recipe_is_printed_and_saved",
            "test_train_loop.py::test_resume_names_what_differs",
            "test_train_recipe.py::test_differences_name_keys_with_both_values",
        ),
    ),
    21: Complaint(
        "loss goes NaN: an abort after days, or nothing is said",
        (
            "test_train_loop.py::test_non_finite_steps_are_skipped_and_counted",
            "test_train_loop.py::test_a_gradient_that_is_not_finite_is_skipped",
            "test_train_loop.py::test_ten_in_a_row_end_the_run_at_the_last_good_checkpoint",
            "test_train_loop.py::test_weights_that_are_not_finite_are_never_saved",
        ),
    ),
    22: Complaint(
        "one unreadable picture kills a run late",
        (
            "test_train_data.py::test_every_unreadable_picture_is_listed",
            "test_train_cli.py::test_unreadable_pictures_are_one_line",
            "test_train_check.py::test_every_unreadable_file_is_listed_at_once",
            "test_train_pairs.py::test_every_fault_is_listed_at_once",
        ),
    ),
    23: Complaint(
        "silent hang at the first iteration",
        (
            "test_train_cli.py::test_a_whole_run_then_again",
            "test_train_cli.py::test_news_come_at_once_and_tell_the_time_left",
            "test_train_loop.py::test_a_run_writes_all_it_promises",
        ),
    ),
    24: Complaint(
        "out of memory, and no word which knob",
        ("test_train_loop.py::test_out_of_memory_names_batch_and_size",),
    ),
    25: Complaint(
        "two GPUs are slower than one",
        (
            "test_train_processes.py::test_two_processes_give_the_losses_of_one",
            "test_train_processes.py::test_a_batch_that_cannot_be_shared_is_refused",
        ),
    ),
    26: Complaint(
        "MATLAB needed for LR pictures, wrong bicubic gives wrong PSNR",
        (
            "test_users.py::test_our_bicubic_is_that_of_matlab",
            "test_train_data.py::test_degrade_reduces_with_the_named_filter",
            "test_train_data.py::test_a_crop_is_reduced_as_in_the_whole_picture",
            "test_benchmarks_quality.py::test_bicubic_reaches_the_published_figure",
        ),
    ),
    27: Complaint(
        "long fine-tuning shifts colours",
        (
            "test_train_cli.py::test_colour_drift_is_logged",
            "test_train_losses.py::test_colour_sees_the_mean_and_not_the_detail",
            "test_train_recipe.py::test_fast_perceptual_goes_on_from_fast",
        ),
    ),
}


def test_every_complaint_is_listed() -> None:
    assert list(COMPLAINTS) == list(range(1, 28))
    # 2, 6, 7 and 8 speak of engines that are built ahead.
    assert {number for number, complaint in COMPLAINTS.items() if "TensorRT" in complaint.missing} == {2, 6, 7, 8}


@pytest.mark.parametrize("number", COMPLAINTS)
def test_the_tests_named_are_there(number: int) -> None:
    assert COMPLAINTS[number].tests
    for place in COMPLAINTS[number].tests:
        file, _, name = place.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        assert len(functions) == 1, place
        checks = [node for node in ast.walk(functions[0]) if isinstance(node, (ast.Assert, ast.Call))]
        assert checks, f"{place} checks nothing"
        marks = [ast.unparse(decorator) for decorator in functions[0].decorator_list]
        assert not any(".xfail" in mark or mark.endswith(".skip") for mark in marks), f"{place} is switched off"


# 26: the published figures rest on MATLAB's imresize, which is written down here anew from its definition.


def keys_cubic(x: np.ndarray) -> np.ndarray:
    """R. Keys, "Cubic convolution interpolation" (1981), a = -0.5, as MATLAB's imresize has it."""
    x = abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0))


def matlab_weights(length: int, target: int) -> np.ndarray:
    """Weights (target, length) of one axis: the kernel widened when reducing, borders mirrored with their pixel."""
    ratio = target / length
    widen = min(ratio, 1)
    centres = (np.arange(target) + 0.5) / ratio - 0.5
    taps = np.floor(centres - 2 / widen)[:, None] + np.arange(np.ceil(4 / widen) + 2)
    values = widen * keys_cubic(widen * (centres[:, None] - taps))
    values /= values.sum(axis=1, keepdims=True)
    places = taps.astype(int) % (2 * length)
    places = np.minimum(places, 2 * length - 1 - places)
    weights = np.zeros((target, length))
    np.add.at(weights, (np.arange(target)[:, None], places), values)
    return weights


def matlab_bicubic(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) uint8, rows first; uint8 between the axes, as MATLAB's is."""
    rows = np.einsum("yh,hwc->ywc", matlab_weights(len(picture), height), picture.astype(float))
    rows = np.clip(np.floor(rows + 0.5), 0, 255)
    both = np.einsum("xw,ywc->yxc", matlab_weights(picture.shape[1], width), rows)
    return np.clip(np.floor(both + 0.5), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_our_bicubic_is_that_of_matlab(scale: int, make_photo) -> None:
    height, width = 96, 120
    hr = make_photo(height, width, 5)
    size = height // scale, width // scale
    expected = matlab_bicubic(hr, *size)
    pillow = np.asarray(Image.fromarray(hr).resize(size[::-1], Image.Resampling.BICUBIC))
    difference = abs(expected.astype(int) - pillow)
    # Rounded twice, here between the axes in another order. At borders Pillow leaves out what MATLAB mirrors.
    assert difference[2:-2, 2:-2].max() <= 2 and difference[2:-2, 2:-2].mean() < 0.3

    def psnr(lr: np.ndarray, enlarged: np.ndarray) -> float:
        return float(10 * np.log10(255**2 / np.mean((enlarged.astype(float) - hr)[8:-8, 8:-8] ** 2)))

    ours = np.asarray(Image.fromarray(pillow).resize((width, height), Image.Resampling.BICUBIC))
    # The protocol's tolerance: PSNR of bicubic is that of MATLAB within 0.01 dB.
    assert abs(psnr(pillow, ours) - psnr(expected, matlab_bicubic(expected, height, width))) < 0.01
    # A filter that does not widen when reducing, as torch's and OpenCV's, would not pass.
    thin = hr[scale // 2 :: scale, scale // 2 :: scale]
    assert abs(expected.astype(int) - thin)[2:-2, 2:-2].max() > 20
