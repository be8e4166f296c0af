"""A tiny Qwen2-VL of the real classes, with its processor, and its weights under the names that rewards publish."""

import torch

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
WORDS = (
    "<pad> <unk> system user assistant judge this picture of prompt says the rating is quality motion alignment end "
    "a red blue yellow green circle two squares star ring cat and dog three cyan triangles left pink cross photo"
).split()
CHAT = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|> {% endif %}"
    "{% endfor %} <|im_end|>{% endfor %}{% if add_generation_prompt %} <|im_start|> assistant{% endif %}"
)


def processor(patch=14):
    """A real Qwen2-VL processor around a tokenizer of whole words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = dict.fromkeys([*WORDS, *SPECIAL])
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>")
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    bounds = {"patch_size": patch, "size": {"shortest_edge": 4 * patch**2, "longest_edge": 10**7}}
    return transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(**bounds),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**bounds),
        chat_template=CHAT,
    )


def model(tokenizer, rows, patch=14):
    """A random Qwen2-VL with `rows` word embeddings; large weights, so that everything matters."""
    import transformers

    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        text_config={
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"num_key_value_heads": 2, "vocab_size": rows, "pad_token_id": 0},
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": patch},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
    )
    made = transformers.Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            large = 1.0 if "embed_tokens" in name else 0.2
            parameter.add_(torch.randn_like(parameter) * (large if parameter.dim() > 1 else 0.1))
    return made.eval()


def published_state(made):
    """The weights under the names of transformers 4.45, which the authors' training code saved."""
    state = {}
    for name, value in made.state_dict().items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        state[name] = value.detach().clone().contiguous()
    return state


def hidden_states(made, inputs):
    """Last hidden states of the real model, tokens counted one after another as in the authors' training code."""
    length = inputs["input_ids"].shape[1]
    known = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    with torch.no_grad():
        return made.model(
            **{name: inputs[name] for name in known if name in inputs},
            position_ids=torch.arange(length).expand(3, len(inputs["input_ids"]), length),
        ).last_hidden_state
