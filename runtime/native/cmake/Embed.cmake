# The bytes of FROM, and a zero behind them, as the array NAME in the header TO.
file(READ "${FROM}" bytes HEX)
string(REGEX REPLACE "(..)" "0x\\1," bytes "${bytes}")
string(REGEX REPLACE "(0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,)" "\\1\n" bytes "${bytes}")
file(WRITE "${TO}" "#pragma once\nstatic const unsigned char ${NAME}[] = {\n${bytes}0};\n")
