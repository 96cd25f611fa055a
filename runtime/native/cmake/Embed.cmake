# Writes the bytes of FROM, with a zero at the end, as the array NAME into the header TO.
file(READ "${FROM}" bytes HEX)
string(REGEX REPLACE "(..)" "0x\\1," bytes "${bytes}")
string(REGEX REPLACE "(0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,)" "\\1\n" bytes "${bytes}")
file(WRITE "${TO}" "#pragma once\nstatic const unsigned char ${NAME}[] = {\n${bytes}0};\n")
