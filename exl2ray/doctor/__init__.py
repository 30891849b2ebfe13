"""``exl2ray doctor``: what this machine offers, and what would stop or slow a conversion, each with its remedy."""
