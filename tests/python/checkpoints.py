"""Small checkpoints with random weights, made by diffusers itself: real files of several families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["a", "red", "green", "blue", "apple", "cat", "dog", "tree", "sky", "night", "on", "the", "in", "of"]


def _clip_tokenizer(length: int = 16) -> Any:
    vocab = {word + "</w>": index for index, word in enumerate(WORDS)}
    letters = "abcdefghijklmnopqrstuvwxyz,"
    for token in [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]:
        vocab.setdefault(token, len(vocab))
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def _clip_encoder(projected: bool = False, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    tokenizer = _clip_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval()


def _t5(width: int) -> tuple[Any, Any]:
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {word: index + 3 for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(vocab),
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return (
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
            model_max_length=32,
        ),
        transformers.T5EncoderModel(config).eval(),
    )


_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _qwen_tokenizer() -> Any:
    """A token for each letter, so that captions differ in length as their texts do."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<|endoftext|>", *letters])}
    return transformers.Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=_CHAT,
        model_max_length=2048,
    )


def _qwen_3(layers: int, kind: Any) -> tuple[Any, Any]:
    tokenizer = _qwen_tokenizer()
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return tokenizer, kind(config).eval()


def _vae(channels: int = 4, shift: float | None = None) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=[16, 16],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
        shift_factor=shift,
    )


def _unet(**extra: Any) -> Any:
    torch.manual_seed(0)
    options = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return diffusers.UNet2DConditionModel(**(options | extra))


def _heeding(transformer: Any) -> Any:
    """Fresh weights are so small that any caption gives nearly the same picture; not so with these."""
    with torch.no_grad():
        for weight in transformer.transformer_blocks.parameters():
            weight.mul_(3)
    return transformer


def _ddim() -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def stable_diffusion(folder: Path, **unet: Any) -> Path:
    """64 by 64 pixels, latents half that."""
    diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip_encoder(),
        tokenizer=_clip_tokenizer(),
        unet=_unet(**unet),
        scheduler=_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def inpainting(folder: Path) -> Path:
    """Its UNet is given the masked image and the mask beside the latents."""
    return stable_diffusion(folder, in_channels=9)


def instructed(folder: Path) -> Path:
    """Its UNet is given the image beside the latents, as InstructPix2Pix has it."""
    return stable_diffusion(folder, in_channels=8)


def stable_diffusion_2(folder: Path) -> Path:
    """What the second generation changed: v-prediction, linear projections, heads of a fixed size."""
    diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip_encoder(),
        tokenizer=_clip_tokenizer(),
        unet=_unet(use_linear_projection=True, attention_head_dim=(2, 4)),
        scheduler=diffusers.DDIMScheduler.from_config(_ddim().config, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def stable_diffusion_xl(folder: Path) -> Path:
    diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip_encoder(),
        text_encoder_2=_clip_encoder(projected=True, seed=1),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=_unet(
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
            transformer_layers_per_block=(1, 1),
        ),
        scheduler=_ddim(),
        add_watermarker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def stable_diffusion_3(folder: Path) -> Path:
    tokenizer, encoder = _t5(64)
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
    )
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_vae(16, shift=0.0609),
        text_encoder=_clip_encoder(projected=True),
        text_encoder_2=_clip_encoder(projected=True, seed=1),
        text_encoder_3=encoder,
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        tokenizer_3=tokenizer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def flux(folder: Path, guided: bool = False) -> Path:
    """With `guided` the network itself is told the guidance scale, as FLUX.1-dev is."""
    tokenizer, encoder = _t5(32)
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=guided,
    )
    diffusers.FluxPipeline(
        transformer=_heeding(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_vae(shift=0.0),
        text_encoder=_clip_encoder(),
        text_encoder_2=encoder,
        tokenizer=_clip_tokenizer(),
        tokenizer_2=tokenizer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def flux_2_klein(folder: Path, distilled: bool = False) -> Path:
    """The pipeline reads the 27th layer of its text encoder."""
    tokenizer, encoder = _qwen_3(27, transformers.Qwen3ForCausalLM)
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=_heeding(transformer),
        is_distilled=distilled,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def z_image(folder: Path) -> Path:
    """Its turbo flavour has the same parts."""
    tokenizer, encoder = _qwen_3(2, transformers.Qwen3Model)
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=(8, 4, 4),
        axes_lens=(1024, 64, 64),
    )
    # Zeros in a new network, and then nothing would tell how captions are filled up.
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(16, shift=0.1),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def qwen_image(folder: Path) -> Path:
    tokenizer = _qwen_tokenizer()
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
    )
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=_heeding(transformer),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def sana(folder: Path) -> Path:
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab = {token: index for index, token in enumerate([*specials, "▁", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = transformers.GemmaTokenizer(vocab=vocab, merges=[], model_max_length=2048)
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    encoder = transformers.Gemma2Model(config).eval()
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
    )
    diffusers.SanaPipeline(
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def pixart(folder: Path) -> Path:
    """With its tokenizer as older folders have it: a SentencePiece model alone."""
    import sentencepiece

    tokenizer, encoder = _t5(32)
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=32,
        patch_size=2,
        caption_channels=32,
        use_additional_conditions=False,
    )
    diffusers.PixArtSigmaPipeline(
        transformer=_heeding(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    ).save_pretrained(folder, safe_serialization=True)
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20),
        model_prefix=str(folder / "tokenizer" / "spiece"),
        vocab_size=17,
        model_type="char",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer" / "spiece.vocab").unlink()
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 32, "extra_ids": 0}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "T5Tokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def pickled(folder: Path) -> Path:
    """The same model as `stable_diffusion` with its UNet as pickled weights only."""
    stable_diffusion(folder)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save(_unet().state_dict(), folder / "unet/diffusion_pytorch_model.bin")
    return folder


def guarded(folder: Path) -> Path:
    """`stable_diffusion` in the layout of Stable Diffusion 1.5, with a safety checker that objects to everything."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    stable_diffusion(folder)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    text = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=32)
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        # The similarity to a concept is above its threshold, whatever the picture.
        checker.concept_embeds_weights.fill_(-2.0)
        checker.special_care_embeds_weights.fill_(2.0)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    diffusers.StableDiffusionPipeline(
        **{
            **pipeline.components,
            "safety_checker": checker,
            "feature_extractor": transformers.CLIPImageProcessor(
                size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
            ),
        }
    ).save_pretrained(folder, safe_serialization=True)
    return folder
