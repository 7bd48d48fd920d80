"""Forward mode: tensors that carry their tangents, and the rules that move them."""
