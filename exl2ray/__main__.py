"""The program: ``exl2ray``, and ``python -m exl2ray`` where its folder is not on the PATH."""

from typing import NoReturn

from exl2ray import stopping


def program() -> NoReturn:
    """`exl2ray.cli.program`, whose import, too, ends without a traceback when it is stopped."""
    stopping.ends_the_program()
    from exl2ray import cli

    cli.program()


if __name__ == "__main__":
    program()
