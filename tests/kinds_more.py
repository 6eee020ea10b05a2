"""What `kinds` needs beyond what all families have: for recurrent layers, for windows and layers
without positions, for processors that want what is no requirement here."""

import base64
import io

import torch
import transformers
from scipy.io import wavfile
from transformers import BatchFeature

TOKENS = (
    "<im_patch> <im_col> <im_start> <low_res_im_start> <frame_start> <im_end> <frame_end> <im_low>"
).split()
QWEN = "<|image_pad|>", "<|video_pad|>"
SOUND = None, None, "<|AUDIO|>"
ROWS = {
    "qwen3.5": ("Qwen3_5", True, QWEN),
    "qwen3.5-moe": ("Qwen3_5Moe", True, QWEN),
    "minicpm-v-4.6": ("MiniCPMV4_6", False, QWEN),
    "hyperclovax-vision-v2": ("HyperCLOVAXVisionV2", False, QWEN),
    "exaone4.5": ("Exaone4_5_", False, QWEN),
    "muse-spark": ("MuseSpark", False, (*QWEN, "<|AUDIO|>")),
    "perception-lm": ("PerceptionLM", False, QWEN),
    "molmo2": ("Molmo2", False, ("<|image|>", "<|video|>")),
    "voxtral": ("Voxtral", False, SOUND),
    "granite-speech": ("GraniteSpeech", False, SOUND),
}
RECURRENT = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"] * 2,
    head_dim=32,  # of which one half is rotated
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=8,
    shared_expert_intermediate_size=24,
)
TEXT = dict.fromkeys(list(ROWS)[:3], RECURRENT)
ROPE = dict.fromkeys(TEXT, dict(partial_rotary_factor=0.5, mrope_section=[4, 2, 2]))
TEXT["hyperclovax-vision-v2"] = dict(
    logits_scaling=0.5, embedding_multiplier=2.0, attention_multiplier=0.3, residual_multiplier=0.8
)
TEXT["granite-speech"] = dict(TEXT["hyperclovax-vision-v2"], logits_scaling=2.0)
WINDOWS = dict(layer_types=["sliding_attention", "full_attention"] * 3, sliding_window=16)
TEXT["exaone4.5"] = WINDOWS
TEXT["muse-spark"] = WINDOWS | dict(
    layer_rope_theta=[1e4, 0] * 3,
    mlp_layer_types=["dense", "sparse", "sparse"] * 2,
    moe_hidden_size=32,
    qk_scale_factor=2.0,
    final_logit_softcapping=8.0,
)
TEXT["molmo2"] = dict(qk_norm_type="olmo", norm_after=True, rope_scaling_layers=[0, 1, 3])
ROPE["molmo2"] = dict(rope_type="linear", factor=2.0)
VISION = dict(molmo2=dict(image_size=[56, 56], head_dim=16))
AUDIO = {
    "voxtral": dict(intermediate_size=128),  # four rows are a token
    "muse-spark": dict(
        patch_sizes=(16, 4, 5, 4),
        hidden_sizes=(8, 16, 16, 32),
        depths=(1, 1, 1, 1),
        num_hidden_layers=4,
        out_hidden_size=64,
    ),
}


def parts(family, ids):
    "Fields of the configuration of a whole model."
    tower = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2)
    if family == "muse-spark":
        return dict(out_hidden_size=128, projector_hidden_size=32)
    if family == "molmo2":
        adapter = tower | dict(num_key_value_heads=1, head_dim=16, text_hidden_size=64)
        adapter["vision_feature_layer"] = [1, 0]
        return dict(adapter_config=adapter, image_patch_id=ids["<im_patch>"])
    if family == "perception-lm":  # its tower wants timm: another stands in, with its sizes
        seen = transformers.SiglipVisionConfig(
            image_size=56,
            patch_size=14,
            num_hidden_layers=2,
            vision_use_head=False,
            model_args=dict(embed_dim=32, ref_feat_shape=(4, 4)),
            **tower,
        )
        return dict(vision_config=seen, vision_use_cls_token=False, projector_pooling_ratio=2)
    if family == "granite-speech":
        heard = dict(
            input_dim=32, hidden_dim=32, num_layers=2, num_heads=2, output_dim=8, context_size=20
        )
        former = tower | dict(num_hidden_layers=2, encoder_hidden_size=32)
        return dict(
            encoder_config=heard,
            projector_config=dict(model_type="blip_2_qformer", **former),
            has_lora_adapter=False,
        )
    return {}


MARKS = {  # of the tokenizer
    "perception-lm": dict(image_token="<|image_pad|>", video_token="<|video_pad|>"),
    "muse-spark": dict(
        image_token="<|image_pad|>",
        image_start_token="<|begin_of_image|>",
        image_end_token="<|end_of_image|>",
        video_token="<|video_pad|>",
        video_sep_token="<ctx>",
        video_start_token="<|begin_of_video|>",
        video_end_token="<|end_of_video|>",
        audio_token="<|AUDIO|>",
        audio_start_token="<|audio_bos|>",
        audio_end_token="<|audio_eos|>",
    ),
    "minicpm-v-4.6": dict(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        image_start_token="<|begin_of_image|>",
        image_end_token="<|end_of_image|>",
        slice_start_token="<img>",
        slice_end_token="</img>",
        image_id_start_token="<|vision_start|>",
        image_id_end_token="<|vision_end|>",
    ),
}


class Frames(transformers.GraniteSpeechFeatureExtractor):
    "Granite Speech's want torchaudio: here a frame is the loudness of 32 parts of 20 ms."

    def __init__(self):
        transformers.SequenceFeatureExtractor.__init__(self, 32, 16_000, 0.0)
        self.melspec_kwargs = dict(hop_length=160)
        self.projector_window_size = 15
        self.projector_downsample_rate = 5

    def __call__(self, audios, device=None):
        waves, lengths = self._get_audios_and_audio_lengths(audios)
        sizes = self._get_num_audio_features(lengths)
        loud = waves.unfold(-1, 320, 320).unflatten(-1, (32, 10)).abs().mean(-1)
        mask = torch.arange(max(sizes))[None] < torch.tensor(sizes)[:, None]
        made = dict(input_features=loud, audio_embed_sizes=sizes, input_features_mask=mask)
        return BatchFeature(made)


class Spoken(transformers.PreTrainedTokenizerFast):
    "In place of mistral-common's: prompts with sounds as files in base64, padded to 30 s."

    def apply_chat_template(self, conversations, **kwargs):
        ((turn,),) = conversations
        text = "user "
        sounds = []
        for part in turn["content"]:
            if part["type"] == "audio":
                _, wave = wavfile.read(io.BytesIO(base64.b64decode(part["base64"])))
                sounds.append(wave)
                text += "<|AUDIO|> " * 375 * -(-len(sounds[-1]) // 480_000)
            else:
                text += f"{part['text']} "
        out = self([text + "assistant"])
        return out | dict(audio=sounds) if sounds else out


def processor(name, given):
    "The processor of a class, or None: `kinds` knows it."
    if name.startswith("Qwen3_5"):
        size = dict(shortest_edge=28 * 28, longest_edge=16 * 28 * 28 * 2)
        return transformers.Qwen3VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(patch_size=14, size=size),
            video_processor=transformers.Qwen3VLVideoProcessor(patch_size=14, size=size),
            **given,
        )
    if name == "HyperCLOVAXVisionV2":
        size = dict(shortest_edge=28 * 28, longest_edge=16 * 28 * 28)
        return transformers.HyperCLOVAXVisionV2Processor(
            image_processor=transformers.Qwen2VLImageProcessor(size=size),
            video_processor=transformers.Qwen2VLVideoProcessor(size=size),
            **given,
        )
    if name == "Exaone4_5_":
        size = dict(shortest_edge=28 * 28, longest_edge=16 * 28 * 28)
        return transformers.Exaone4_5_Processor(
            image_processor=transformers.Qwen2VLImageProcessor(size=size),
            video_processor=transformers.Qwen2VLVideoProcessor(size=size),
            **given,
        )
    if name == "MuseSpark":
        return transformers.MuseSparkProcessor(
            image_processor=transformers.MuseGlimmerImageProcessor(),
            video_processor=transformers.MuseGlimmerVideoProcessor(),
            feature_extractor=transformers.MuseSparkFeatureExtractor(
                sampling_rate=16_000, samples_per_token=1280
            ),
            **given,
        )
    if name == "PerceptionLM":
        side = dict(size=dict(height=56, width=56))
        return transformers.PerceptionLMProcessor(
            image_processor=transformers.PerceptionLMImageProcessor(tile_size=56, **side),
            video_processor=transformers.PerceptionLMVideoProcessor(**side),
            patch_size=14,
            **given,
        )
    if name == "Molmo2":
        side = dict(size=dict(height=56, width=56), pooling_size=[2, 2])
        return transformers.Molmo2Processor(
            image_processor=transformers.Molmo2ImageProcessor(**side),
            video_processor=transformers.Molmo2VideoProcessor(**side),
            **given,
        )
    if name == "GraniteSpeech":
        return transformers.GraniteSpeechProcessor(Frames(), audio_token="<|AUDIO|>", **given)
    if name == "Voxtral":
        words = Spoken(tokenizer_object=given["tokenizer"]._tokenizer, pad_token="<pad>")
        mel = transformers.WhisperFeatureExtractor(feature_size=16)
        return transformers.VoxtralProcessor(mel, words)
    if name == "MiniCPMV4_6":
        return transformers.MiniCPMV4_6Processor(
            image_processor=transformers.MiniCPMV4_6ImageProcessor(scale_resolution=56),
            video_processor=transformers.MiniCPMV4_6VideoProcessor(
                scale_resolution=84, slice_mode=False, use_image_id=False
            ),
            **given,
        )
    return None
