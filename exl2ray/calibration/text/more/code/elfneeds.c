/*
 * elfneeds.c -- print the DT_NEEDED entries, the run path and the symbol versions a 64-bit
 * little-endian ELF file asks for.
 *
 * $ elfneeds /usr/bin/thing
 * NEEDED  libm.so.6        GLIBC_2.29
 * NEEDED  libc.so.6        GLIBC_2.2.5 GLIBC_2.34
 * RUNPATH $ORIGIN/../lib
 *
 * Works from the program headers alone: section headers may have been stripped, and sstrip'd
 * binaries were the reason to write this.
 */
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct image {
	const char *path;
	const unsigned char *map;
	size_t size;
	const Elf64_Phdr *ph;
	unsigned phnum;
};

static int complain(const struct image *im, const char *msg)
{
	fprintf(stderr, "elfneeds: %s: %s\n", im->path, msg);
	return 1;
}

/* File bytes behind a virtual address, or NULL unless all n of them are backed by the file. */
static const void *at_vaddr(const struct image *im, Elf64_Addr va, size_t n)
{
	unsigned i;

	for (i = 0; i < im->phnum; i++) {
		const Elf64_Phdr *p = &im->ph[i];
		uint64_t off;

		if (p->p_type != PT_LOAD || va < p->p_vaddr)
			continue;
		off = va - p->p_vaddr;
		if (off >= p->p_filesz || n > p->p_filesz - off)
			continue;
		off += p->p_offset;
		if (off > im->size || n > im->size - off)
			return NULL;
		return im->map + off;
	}
	return NULL;
}

struct dyn {
	Elf64_Addr strtab, verneed;
	uint64_t strsz, verneednum;
	const Elf64_Dyn *tab;
	size_t n;
};

static const char *dynstr(const struct image *im, const struct dyn *d, uint64_t off)
{
	const char *s;

	if (off >= d->strsz)
		return "<bad string offset>";
	s = at_vaddr(im, d->strtab, d->strsz);
	if (!s || !memchr(s + off, '\0', d->strsz - off))
		return "<string table damaged>";
	return s + off;
}

/*
 * Verneed is a linked list of files, each with a linked list of versions. The links are byte
 * offsets relative to the current record; zero ends a list. The counts bound the walk, so a
 * crafted file cannot keep us here.
 */
static void print_versions(const struct image *im, const struct dyn *d, const char *lib)
{
	Elf64_Addr va = d->verneed;
	uint64_t i;

	for (i = 0; i < d->verneednum && i < 4096; i++) {
		const Elf64_Verneed *vn = at_vaddr(im, va, sizeof(*vn));
		Elf64_Addr aux;
		unsigned k;

		if (!vn || vn->vn_version != VER_NEED_CURRENT)
			return;
		if (strcmp(dynstr(im, d, vn->vn_file), lib) == 0) {
			aux = va + vn->vn_aux;
			for (k = 0; k < vn->vn_cnt; k++) {
				const Elf64_Vernaux *vna = at_vaddr(im, aux, sizeof(*vna));

				if (!vna)
					return;
				printf(" %s%s", dynstr(im, d, vna->vna_name),
				       vna->vna_flags & VER_FLG_WEAK ? "?" : "");
				if (vna->vna_next == 0)
					break;
				aux += vna->vna_next;
			}
			return;
		}
		if (vn->vn_next == 0)
			return;
		va += vn->vn_next;
	}
}

static int report(const struct image *im, const Elf64_Phdr *pt)
{
	struct dyn d = { 0 };
	size_t i;

	if (pt->p_offset > im->size || pt->p_filesz > im->size - pt->p_offset)
		return complain(im, "dynamic segment lies outside the file");
	if (pt->p_offset % _Alignof(Elf64_Dyn))
		return complain(im, "dynamic segment is misaligned");
	d.tab = (const Elf64_Dyn *)(im->map + pt->p_offset);
	d.n = pt->p_filesz / sizeof(*d.tab);

	for (i = 0; i < d.n && d.tab[i].d_tag != DT_NULL; i++) {
		switch (d.tab[i].d_tag) {
		case DT_STRTAB:		d.strtab = d.tab[i].d_un.d_ptr;		break;
		case DT_STRSZ:		d.strsz = d.tab[i].d_un.d_val;		break;
		case DT_VERNEED:	d.verneed = d.tab[i].d_un.d_ptr;	break;
		case DT_VERNEEDNUM:	d.verneednum = d.tab[i].d_un.d_val;	break;
		}
	}
	d.n = i;

	for (i = 0; i < d.n; i++) {
		const char *s = dynstr(im, &d, d.tab[i].d_un.d_val);

		switch (d.tab[i].d_tag) {
		case DT_NEEDED:
			printf("NEEDED  %-16s", s);
			print_versions(im, &d, s);
			putchar('\n');
			break;
		case DT_SONAME:
			printf("SONAME  %s\n", s);
			break;
		case DT_RPATH:
			/* ignored by the loader whenever a RUNPATH exists; say so by position */
			printf("RPATH   %s\n", s);
			break;
		case DT_RUNPATH:
			printf("RUNPATH %s\n", s);
			break;
		}
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct image im = { 0 };
	const Elf64_Ehdr *eh;
	struct stat st;
	unsigned i;
	int fd;

	if (argc != 2) {
		fprintf(stderr, "usage: elfneeds FILE\n");
		return 2;
	}
	im.path = argv[1];
	fd = open(im.path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &st) < 0)
		return complain(&im, strerror(errno));
	im.size = (size_t)st.st_size;
	if (im.size < sizeof(*eh))
		return complain(&im, "too small to be an ELF file");
	im.map = mmap(NULL, im.size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (im.map == MAP_FAILED)
		return complain(&im, strerror(errno));
	close(fd);

	eh = (const Elf64_Ehdr *)im.map;
	if (memcmp(eh->e_ident, ELFMAG, SELFMAG) != 0)
		return complain(&im, "not an ELF file");
	if (eh->e_ident[EI_CLASS] != ELFCLASS64 || eh->e_ident[EI_DATA] != ELFDATA2LSB)
		return complain(&im, "only 64-bit little-endian files are understood");
	if (eh->e_phentsize != sizeof(Elf64_Phdr) || eh->e_phoff % _Alignof(Elf64_Phdr) ||
	    eh->e_phoff > im.size || eh->e_phnum > (im.size - eh->e_phoff) / sizeof(Elf64_Phdr))
		return complain(&im, "program headers make no sense");
	im.ph = (const Elf64_Phdr *)(im.map + eh->e_phoff);
	im.phnum = eh->e_phnum;

	for (i = 0; i < im.phnum; i++)
		if (im.ph[i].p_type == PT_DYNAMIC)
			return report(&im, &im.ph[i]);
	puts("statically linked");
	return 0;
}
