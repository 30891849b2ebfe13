"""``python -m exl2ray``: the program, where its folder is not on the PATH."""

from exl2ray.cli import program

if __name__ == "__main__":
    program()
