"""Towers: the encoders of pictures and sound that several multimodal models have in common.

vit       the vision transformer of one size that clip and siglip are
clip      CLIP's, with a class token
siglip    SigLIP's, without one
qwen2_vl  Qwen2-VL's, for pictures and videos of any size
pixtral   Pixtral's, for pictures of any size
whisper   Whisper's, for sound
grid      places in a grid of patches, and rotary angles of them
features  outputs of several layers side by side
pixels    pictures to numbers, and the sizes that follow from a picture's own
recipes   which of these steps a model's files ask for
sound     sound to numbers
languages the language models beside which towers stand

Each of clip, siglip, qwen2_vl, pixtral and whisper holds `Config` (with `read`), `describe(config)`, which gives a
block, and `NAMES`, the tower's own tensor names: `NAMES.under("vision_tower.", "encoder.tower.")` mounts them. Nothing
here registers an architecture, knows what a language model does with the vectors, or opens a file.
"""
