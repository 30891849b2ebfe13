# Typeset the village cookbook: one Markdown file per recipe, one PDF and one EPUB of all of them.
#
#   make -f cookbook.mk            both books
#   make -f cookbook.mk check      spelling, and units somebody forgot to convert
#   make -f cookbook.mk proof R=plum_dumplings    a single recipe, opened in the viewer

SHELL       := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS   += --no-builtin-rules
.DELETE_ON_ERROR:
.SECONDEXPANSION:

build    := build
chapters := soups bread dumplings fish preserves cakes
recipes  := $(foreach c,$(chapters),$(sort $(wildcard recipes/$(c)/*.md)))
photos   := $(patsubst photos/%.jpg,$(build)/photos/%.jpg,$(wildcard photos/*.jpg))

ifeq ($(strip $(recipes)),)
  $(error No recipes found; run make from the top of the repository)
endif

pandoc_flags := --from markdown+fancy_lists-smart --lua-filter=tools/quantities.lua --resource-path=$(build)
edition      := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

.PHONY: all
all: $(build)/cookbook.pdf $(build)/cookbook.epub

# A chapter is a title page followed by its recipes. $$ delays the wildcard until the stem is known.
$(build)/%.chapter.md: recipes/%/_title.md $$(wildcard recipes/$$*/*.md) | $(build)
	{ cat $<; for r in $(sort $(filter-out $<,$^)); do printf '\n\n'; cat "$$r"; done; } >$@

$(build)/cookbook.pdf: $(chapters:%=$(build)/%.chapter.md) $(photos) tools/quantities.lua style/book.tex
	pandoc $(pandoc_flags) --pdf-engine=lualatex --template=style/book.tex \
		--variable=edition:'$(edition)' --top-level-division=chapter \
		--output=$@ $(filter %.md,$^)

$(build)/cookbook.epub: $(chapters:%=$(build)/%.chapter.md) $(photos) tools/quantities.lua style/epub.css
	pandoc $(pandoc_flags) --css=style/epub.css --epub-cover-image=$(build)/photos/cover.jpg \
		--metadata=title:'What the Neighbours Cook' --output=$@ $(filter %.md,$^)

# Cameras deliver six thousand pixels; the page is 148 mm wide.
$(build)/photos/%.jpg: photos/%.jpg | $(build)/photos
	magick $< -auto-orient -resize '1800x1800>' -strip -quality 84 $@

$(build) $(build)/photos:
	mkdir -p $@

.PHONY: check
check: $(build)/spelling.ok
	@! grep -nE '[0-9] ?(cups?|oz|lbs?)\b' $(recipes) || { echo 'Grams and millilitres, please.' >&2; exit 1; }

$(build)/spelling.ok: $(recipes) tools/words.txt | $(build)
	@bad=$$(cat $(recipes) | aspell --lang=en_GB --mode=markdown --personal=./tools/words.txt list | sort -u); \
	if [[ -n $$bad ]]; then printf 'Not in the dictionary:\n%s\n' "$$bad" >&2; exit 1; fi
	@touch $@

.PHONY: proof
proof: | $(build)
	$(if $(R),,$(error Say which recipe: R=name))
	pandoc $(pandoc_flags) --pdf-engine=lualatex --output=$(build)/proof.pdf $(firstword $(wildcard recipes/*/$(R).md))
	xdg-open $(build)/proof.pdf

.PHONY: clean
clean:
	rm -rf $(build)
