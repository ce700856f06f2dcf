"""Checkpoints as the hub lists them: names of their files, and their configurations. Weights are of no use here.

Of a configuration those keys stand here that somebody reads; values are the published ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
EULER = {
    "_class_name": "EulerDiscreteScheduler", **BETAS, "clip_sample": False, "interpolation_type": "linear",
    "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
}  # fmt: skip
TOKENIZER = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
SD_1_5_UNET = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}  # fmt: skip
SD_2_1_UNET = {
    **SD_1_5_UNET, "_diffusers_version": "0.10.0.dev0", "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024, "dual_cross_attention": False, "num_class_embeds": None,
    "only_cross_attention": False, "sample_size": 96, "use_linear_projection": True,
}  # fmt: skip
SDXL_UNET = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.24.0.dev0", "act_fn": "silu",
    "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "attention_type": "default", "block_out_channels": [320, 640, 1280],
    "center_input_sample": False, "class_embed_type": None, "class_embeddings_concat": False, "conv_in_kernel": 3,
    "conv_out_kernel": 3, "cross_attention_dim": 2048, "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "downsample_padding": 1,
    "dropout": 0.0, "dual_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_only_cross_attention": None, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05, "norm_num_groups": 32, "num_attention_heads": None, "num_class_embeds": None,
    "only_cross_attention": False, "out_channels": 4, "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False, "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None, "sample_size": 128, "time_cond_proj_dim": None,
    "time_embedding_type": "positional", "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "upcast_attention": None,
    "use_linear_projection": True,
}  # fmt: skip
SD_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SDXL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SD_VAE = {"_class_name": "AutoencoderKL", "latent_channels": 4, "scaling_factor": 0.18215}
SDXL_VAE = {"_class_name": "AutoencoderKL", "latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True}
Files = Mapping[str, Any]
"""Content of a JSON file by its name; of others nobody looks at the content."""


def scheduled(index: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Files:
    """`model_index.json` and the scheduler's file, of one mind."""
    return {
        "model_index.json": {**index, "scheduler": ["diffusers", scheduler["_class_name"]]},
        "scheduler/scheduler_config.json": scheduler,
    }


def sd(scheduler: Mapping[str, Any], unet: Mapping[str, Any], suffix: str = "safetensors", **index: Any) -> Files:
    """A checkpoint of Stable Diffusion's files."""
    text = "model" if suffix == "safetensors" else "pytorch_model"
    return {
        **scheduled({**SD_INDEX, **index}, scheduler),
        "feature_extractor/preprocessor_config.json": {},
        "safety_checker/config.json": {}, f"safety_checker/{text}.{suffix}": None,
        "text_encoder/config.json": {"hidden_size": unet["cross_attention_dim"]}, f"text_encoder/{text}.{suffix}": None,
        **{f"tokenizer/{name}": {} for name in TOKENIZER},
        "unet/config.json": unet, f"unet/diffusion_pytorch_model.{suffix}": None,
        "vae/config.json": SD_VAE, f"vae/diffusion_pytorch_model.{suffix}": None,
    }  # fmt: skip


def sdxl(scheduler: Mapping[str, Any], unet: Mapping[str, Any] = SDXL_UNET, **index: Any) -> Files:
    """A checkpoint of Stable Diffusion XL's files."""
    return {
        **scheduled({**SDXL_INDEX, **index}, scheduler),
        "text_encoder/config.json": {"hidden_size": 768}, "text_encoder/model.safetensors": None,
        "text_encoder_2/config.json": {"hidden_size": 1280, "projection_dim": 1280},
        "text_encoder_2/model.safetensors": None,
        **{f"{part}/{name}": {} for part in ("tokenizer", "tokenizer_2") for name in TOKENIZER},
        "unet/config.json": unet, "unet/diffusion_pytorch_model.safetensors": None,
        "vae/config.json": SDXL_VAE, "vae/diffusion_pytorch_model.safetensors": None,
    }  # fmt: skip


FLOW = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
    "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0,
    "use_dynamic_shifting": False,
}  # fmt: skip
SD3_TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel", "attention_head_dim": 64, "caption_projection_dim": 1536,
    "in_channels": 16, "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16,
    "patch_size": 2, "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "sample_size": 128,
}  # fmt: skip
FLUX_TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel", "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True, "in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24,
    "num_layers": 19, "num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768,
}  # fmt: skip
SD3_VAE = {"_class_name": "AutoencoderKL", "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX_VAE = {"_class_name": "AutoencoderKL", "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
SD3_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
FLUX_INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
QWEN_FLOW = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
    "invert_sigmas": False, "max_image_seq_len": 8192, "max_shift": 0.9, "num_train_timesteps": 1000, "shift": 1.0,
    "shift_terminal": 0.02, "stochastic_sampling": False, "time_shift_type": "exponential", "use_beta_sigmas": False,
    "use_dynamic_shifting": True, "use_exponential_sigmas": False, "use_karras_sigmas": False,
}  # fmt: skip
QWEN_TRANSFORMER = {
    "_class_name": "QwenImageTransformer2DModel", "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False, "in_channels": 64, "joint_attention_dim": 3584, "num_attention_heads": 24,
    "num_layers": 60, "out_channels": 16, "patch_size": 2,
}  # fmt: skip
QWEN_VAE = {
    "_class_name": "AutoencoderKLQwenImage", "attn_scales": [], "base_dim": 96, "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0, "num_res_blocks": 2, "temperal_downsample": [False, True, True], "z_dim": 16,
}  # fmt: skip
QWEN_VL = {
    "hidden_act": "silu", "hidden_size": 3584, "image_token_id": 151655, "intermediate_size": 18944,
    "max_position_embeddings": 128000, "model_type": "qwen2_5_vl", "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}, "vocab_size": 152064,
    "vision_config": {
        "depth": 32, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu", "hidden_size": 1280,
        "intermediate_size": 3420, "model_type": "qwen2_5_vl", "num_heads": 16, "out_hidden_size": 3584,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2, "window_size": 112,
    },
}  # fmt: skip
QWEN_PROCESSOR = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711], "max_pixels": 12845056, "merge_size": 2, "min_pixels": 3136,
    "patch_size": 14, "resample": 3, "rescale_factor": 0.00392156862745098, "temporal_patch_size": 2,
}  # fmt: skip
QWEN_INDEX = {
    "_class_name": "QwenImagePipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}
QWEN_TOKENIZER = (*TOKENIZER, "added_tokens.json", "chat_template.jinja")
KLEIN_TRANSFORMER = {
    "_class_name": "Flux2Transformer2DModel", "attention_head_dim": 128, "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-06, "guidance_embeds": False, "in_channels": 128, "joint_attention_dim": 7680, "mlp_ratio": 3.0,
    "num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20, "out_channels": None, "patch_size": 1,
    "rope_theta": 2000, "timestep_guidance_channels": 256,
}  # fmt: skip
KLEIN_VAE = {
    "_class_name": "AutoencoderKLFlux2", "batch_norm_eps": 0.0001, "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True, "latent_channels": 32,
    "layers_per_block": 2, "patch_size": [2, 2], "sample_size": 1024, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
QWEN3_4B = {
    "head_dim": 128, "hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 40960,
    "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "tie_word_embeddings": True, "vocab_size": 151936,
}  # fmt: skip
KLEIN_INDEX = {
    "_class_name": "Flux2KleinPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}
KLEIN_TOKENIZER = (*TOKENIZER, "added_tokens.json", "chat_template.jinja", "tokenizer.json")
T5_TOKENIZER = ("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json")


def sharded(part: str, stem: str, number: int) -> Files:
    """Weights in several files, as the large networks are published."""
    shards = [f"{stem}-{one + 1:05}-of-{number:05}.safetensors" for one in range(number)]
    return {
        **{f"{part}/{name}": None for name in shards},
        f"{part}/{stem}.safetensors.index.json": {"weight_map": {str(at): name for at, name in enumerate(shards)}},
    }


def sd3(scheduler: Mapping[str, Any] = FLOW, transformer: Mapping[str, Any] = SD3_TRANSFORMER, **index: Any) -> Files:
    """A checkpoint of Stable Diffusion 3's files."""
    return {
        **scheduled({**SD3_INDEX, **index}, scheduler),
        "text_encoder/config.json": {"hidden_size": 768, "projection_dim": 768}, "text_encoder/model.safetensors": None,
        "text_encoder_2/config.json": {"hidden_size": 1280, "projection_dim": 1280},
        "text_encoder_2/model.safetensors": None,
        "text_encoder_3/config.json": {"d_model": 4096}, **sharded("text_encoder_3", "model", 2),
        **{f"{part}/{name}": {} for part in ("tokenizer", "tokenizer_2") for name in TOKENIZER},
        **{f"tokenizer_3/{name}": {} for name in T5_TOKENIZER},
        "transformer/config.json": transformer, "transformer/diffusion_pytorch_model.safetensors": None,
        "vae/config.json": SD3_VAE, "vae/diffusion_pytorch_model.safetensors": None,
    }  # fmt: skip


def flux(scheduler: Mapping[str, Any], transformer: Mapping[str, Any] = FLUX_TRANSFORMER, **index: Any) -> Files:
    """A checkpoint of FLUX.1's files."""
    return {
        **scheduled({**FLUX_INDEX, **index}, scheduler),
        "flux1-dev.safetensors": None, "ae.safetensors": None,
        "text_encoder/config.json": {"hidden_size": 768}, "text_encoder/model.safetensors": None,
        "text_encoder_2/config.json": {"d_model": 4096}, **sharded("text_encoder_2", "model", 2),
        **{f"tokenizer/{name}": {} for name in TOKENIZER},
        **{f"tokenizer_2/{name}": {} for name in T5_TOKENIZER},
        "transformer/config.json": transformer, **sharded("transformer", "diffusion_pytorch_model", 3),
        "vae/config.json": FLUX_VAE, "vae/diffusion_pytorch_model.safetensors": None,
    }  # fmt: skip


def qwen(scheduler: Mapping[str, Any] = QWEN_FLOW, **transformer: Any) -> Files:
    """A checkpoint of Qwen-Image's files. `transformer`: keys of its configuration that differ."""
    return {
        **scheduled(QWEN_INDEX, scheduler),
        "text_encoder/config.json": QWEN_VL, **sharded("text_encoder", "model", 4),
        **{f"tokenizer/{name}": {} for name in QWEN_TOKENIZER},
        "transformer/config.json": {**QWEN_TRANSFORMER, **transformer},
        **sharded("transformer", "diffusion_pytorch_model", 9),
        "vae/config.json": QWEN_VAE, "vae/diffusion_pytorch_model.safetensors": None,
    }  # fmt: skip


def qwen_edit(pipeline: str = "QwenImageEditPipeline") -> Files:
    """A checkpoint of Qwen-Image-Edit's files."""
    files = qwen()
    index = {"_class_name": pipeline, "processor": ["transformers", "Qwen2VLProcessor"]}
    return {
        **files,
        "model_index.json": {**files["model_index.json"], **index},
        **{f"processor/{name}": {} for name in (*QWEN_TOKENIZER, "tokenizer.json", "video_preprocessor_config.json")},
        "processor/preprocessor_config.json": QWEN_PROCESSOR,
    }


def klein(
    transformer: Mapping[str, Any] = KLEIN_TRANSFORMER,
    vae: Mapping[str, Any] = KLEIN_VAE,
    text_encoder: Mapping[str, Any] = QWEN3_4B,
    **index: Any,
) -> Files:
    """A checkpoint of FLUX.2 klein's files."""
    return {
        **scheduled({**KLEIN_INDEX, **index}, {**FLOW, "use_dynamic_shifting": True}),
        "flux-2-klein-base-4b.safetensors": None,
        "text_encoder/config.json": text_encoder, **sharded("text_encoder", "model", 2),
        **{f"tokenizer/{name}": {} for name in KLEIN_TOKENIZER},
        "transformer/config.json": transformer, "transformer/diffusion_pytorch_model.safetensors": None,
        "vae/config.json": vae, "vae/diffusion_pytorch_model.safetensors": None,
    }  # fmt: skip


LCM = {
    "_class_name": "LCMScheduler", **BETAS, "clip_sample": False, "original_inference_steps": 50,
    "prediction_type": "epsilon", "rescale_betas_zero_snr": False, "set_alpha_to_one": True, "steps_offset": 0,
    "thresholding": False, "timestep_scaling": 10.0, "timestep_spacing": "leading", "trained_betas": None,
}  # fmt: skip
EDM = {
    "_class_name": "EDMDPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "rho": 7.0, "sigma_data": 0.5, "sigma_max": 80.0,
    "sigma_min": 0.002, "solver_order": 2, "solver_type": "midpoint", "thresholding": False,
}  # fmt: skip
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
PNDM = {
    "_class_name": "PNDMScheduler", **BETAS, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None, "clip_sample": False,
}  # fmt: skip
V_DDIM = {
    "_class_name": "DDIMScheduler", **BETAS, "prediction_type": "v_prediction", "set_alpha_to_one": False,
    "clip_sample": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
EULER_TRAILING = {**EULER, "timestep_spacing": "trailing"}
ANCESTRAL_TRAILING = {**EULER_TRAILING, "_class_name": "EulerAncestralDiscreteScheduler"}
# stabilityai/sdxl-turbo and sd-turbo have the side of 512 pixels.
SDXL_TURBO_UNET = {**SDXL_UNET, "sample_size": 64}
SD_TURBO_UNET = {**SD_2_1_UNET, "sample_size": 64}

PUBLISHED: dict[str, Files] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": sd(PNDM, SD_1_5_UNET),
    "stabilityai/stable-diffusion-2-1": sd(V_DDIM, SD_2_1_UNET),
    "stabilityai/stable-diffusion-2-1-base": sd(PNDM, {**SD_2_1_UNET, "sample_size": 64}),
    "stabilityai/sd-turbo": sd(EULER_TRAILING, SD_TURBO_UNET),
    "SimianLuo/LCM_Dreamshaper_v7": sd(
        LCM, {**SD_1_5_UNET, "time_cond_proj_dim": 256}, _class_name="LatentConsistencyModelPipeline"
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": sdxl(EULER),
    "stabilityai/sdxl-turbo": sdxl(ANCESTRAL_TRAILING, SDXL_TURBO_UNET),
    "stabilityai/stable-diffusion-3-medium-diffusers": sd3(),
    "stabilityai/stable-diffusion-3.5-medium": sd3(
        FLOW, {**SD3_TRANSFORMER, "dual_attention_layers": [*range(13)], "pos_embed_max_size": 384}
    ),
    "black-forest-labs/FLUX.1-dev": flux({**FLOW, "use_dynamic_shifting": True}),
    "black-forest-labs/FLUX.1-schnell": flux({**FLOW, "shift": 1.0}, {**FLUX_TRANSFORMER, "guidance_embeds": False}),
    "black-forest-labs/FLUX.1-Kontext-dev": flux(
        {**FLOW, "use_dynamic_shifting": True}, _class_name="FluxKontextPipeline"
    ),
    "black-forest-labs/FLUX.1-Fill-dev": flux(
        {**FLOW, "use_dynamic_shifting": True}, {**FLUX_TRANSFORMER, "in_channels": 384, "out_channels": 64},
        _class_name="FluxFillPipeline",
    ),
    "Qwen/Qwen-Image": qwen(),
    "Qwen/Qwen-Image-Edit": qwen_edit(),
    "Qwen/Qwen-Image-Edit-2509": qwen_edit("QwenImageEditPlusPipeline"),
    "black-forest-labs/FLUX.2-klein-base-4B": klein(),
    "black-forest-labs/FLUX.2-klein-4B": klein(is_distilled=True),
    "playgroundai/playground-v2.5-1024px-aesthetic": sdxl(EDM),
    "latent-consistency/lcm-sdxl": {  # a UNet alone
        "config.json": {**SDXL_UNET, "time_cond_proj_dim": 256}, "diffusion_pytorch_model.safetensors": None,
    },
    "runwayml/stable-diffusion-v1-5 of October 2022": {
        **sd(PNDM, SD_1_5_UNET, "bin"), "v1-5-pruned.ckpt": None, "v1-5-pruned-emaonly.ckpt": None,
    },
    "PixArt-alpha/PixArt-XL-2-1024-MS": {
        "model_index.json": {
            "_class_name": "PixArtAlphaPipeline", "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
            "text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"],
            "transformer": ["diffusers", "Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
        },
        "scheduler/scheduler_config.json": {"_class_name": "DPMSolverMultistepScheduler"},
        "text_encoder/config.json": {}, "tokenizer/spiece.model": None,
        "transformer/config.json": {}, "transformer/diffusion_pytorch_model.safetensors": None,
        "vae/config.json": SDXL_VAE, "vae/diffusion_pytorch_model.safetensors": None,
    },
    "kandinsky-community/kandinsky-2-2-decoder": {
        "model_index.json": {
            "_class_name": "KandinskyV22Pipeline", "movq": ["diffusers", "VQModel"],
            "scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DConditionModel"],
        },
        "movq/config.json": {}, "movq/diffusion_pytorch_model.safetensors": None,
        "scheduler/scheduler_config.json": {"_class_name": "DDPMScheduler"},
        "unet/config.json": {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"},
        "unet/diffusion_pytorch_model.safetensors": None,
    },
    "stabilityai/stable-diffusion-xl-refiner-1.0": {
        "model_index.json": {
            **SDXL_INDEX, "_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True,
            "text_encoder": [None, None], "tokenizer": [None, None],
        },
        "scheduler/scheduler_config.json": EULER,
        "unet/config.json": {**SDXL_UNET, "projection_class_embeddings_input_dim": 2560},
    },
}  # fmt: skip


def put(folder: Path, files: Files) -> Path:
    """Write a checkpoint; its weights are empty files, which nobody can load."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if content is None else json.dumps(content))
    return folder
