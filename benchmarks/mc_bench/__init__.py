"""MC-Bench: six scenarios of two or three concepts, and nine measures of what a model makes of them."""
