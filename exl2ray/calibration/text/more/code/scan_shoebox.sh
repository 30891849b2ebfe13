#!/usr/bin/env bash
#
# scan-shoebox DIR - turn a shoebox of old photographs into a directory of named, straightened scans
#
# Lay up to four prints on the glass, press Enter, repeat; an empty line with "q" ends the session. A line of text
# instead of Enter becomes the caption of everything on the glass ("Norderney 1961, Tante Frieda").
#
# Needs: scanimage (SANE), ImageMagick 7, exiftool. Raw scans are kept until the crops were written.

set -euo pipefail
shopt -s nullglob

readonly dpi=600
readonly smallest=$((dpi * 2 * dpi * 2))    # crops under 2 x 2 inches are dust or a paper clip

die() { printf 'scan-shoebox: %s\n' "$*" >&2; exit 1; }

[[ $# -eq 1 ]] || die 'usage: scan-shoebox DIR'
for tool in scanimage magick exiftool; do
    command -v "$tool" >/dev/null || die "$tool is not installed"
done

out=$1
mkdir -p -- "$out/raw"

# One session per directory: two would hand out the same numbers.
exec 9>"$out/.lock"
flock -n 9 || die "another session is writing to $out"

next_number() {
    local last=0 f n
    for f in "$out"/photo-*.tif; do
        n=${f##*/photo-}
        n=$((10#${n%.tif}))
        (( n > last )) && last=$n
    done
    echo $((last + 1))
}

# Prints on a dark lid: blur, threshold, and let connected components give one bounding box per print.
boxes() {
    magick "$1" -resize 12.5% -colorspace gray -blur 0x3 -threshold 22% \
        -define connected-components:verbose=true \
        -define connected-components:area-threshold=400 \
        -connected-components 8 null: |
    awk 'NR > 1 && $NF ~ /gray\(255\)|srgb\(255,255,255\)|white/ {
        split($2, g, /[x+]/)
        printf "%dx%d+%d+%d\n", g[1] * 8, g[2] * 8, g[3] * 8, g[4] * 8
    }'
}

crop_all() {
    local raw=$1 caption=$2 geometry w h n target kept=0
    while read -r geometry; do
        IFS='x+' read -r w h _ <<<"$geometry"
        (( w * h >= smallest )) || continue
        n=$(next_number)
        printf -v target '%s/photo-%04d.tif' "$out" "$n"
        magick "$raw" -crop "$geometry" +repage -background black -deskew 40% +repage \
            -fuzz 18% -trim +repage -compress zip "$target"
        [[ -z $caption ]] || exiftool -q -overwrite_original \
            -IPTC:CodedCharacterSet=UTF8 -IPTC:Caption-Abstract="$caption" -- "$target"
        printf '  %s  %s\n' "${target##*/}" "$geometry"
        kept=$((kept + 1))
    done < <(boxes "$raw")
    (( kept > 0 ))
}

glass=0
while IFS= read -r -p "Glass $((glass + 1)), caption or q: " caption; do
    [[ $caption != q ]] || break
    glass=$((glass + 1))
    raw=$out/raw/$(date +%Y%m%dT%H%M%S).tif
    if ! scanimage --resolution "$dpi" --mode Color --format=tiff >"$raw.part"; then
        rm -f -- "$raw.part"
        echo '  scanner said no; is the lid unlocked?' >&2
        continue
    fi
    mv -- "$raw.part" "$raw"
    if crop_all "$raw" "$caption"; then
        rm -- "$raw"
    else
        echo "  found no print, kept ${raw#"$out"/} for cropping by hand" >&2
    fi
done
printf '\n%d glasses, %d photographs in %s\n' "$glass" $(( $(next_number) - 1 )) "$out"
