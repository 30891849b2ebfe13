/*
 * sysdep.h -- everything that differs between the systems we run on.
 *
 * If you are tempted to put an #ifdef into a .c file: put it here.
 * Tested (by somebody, at some time) on the systems named below.  Systems in
 * parentheses have not been heard of since release 2.3.
 *
 *	Linux, FreeBSD, NetBSD, OpenBSD, macOS 10.4+, Solaris 8+,
 *	(HP-UX 11), (AIX 4.3), (IRIX 6.5), (Tru64 4.0F), (UnixWare 7),
 *	Cygwin, Win32 with MSVC 6 or MinGW, (OS/2 EMX), (DJGPP)
 */
#ifndef DORY_SYSDEP_H
#define DORY_SYSDEP_H

#ifdef HAVE_CONFIG_H
#  include <config.h>
#endif

/* ---- which system is it? --------------------------------------------- */

#if defined(_WIN32) || defined(__WIN32__)
#  define OS_WIN32 1
#elif defined(__EMX__)
#  define OS_OS2 1
#elif defined(__DJGPP__) || defined(__MSDOS__)
#  define OS_DOS 1
#else
#  define OS_UNIX 1
#endif

#if defined(__APPLE__) && defined(__MACH__)
#  define OS_DARWIN 1
#endif

#if defined(sun) || defined(__sun)
#  if defined(__SVR4) || defined(__svr4__)
#    define OS_SOLARIS 1
#  else
#    define OS_SUNOS4 1		/* may it rest in peace */
#  endif
#endif

/* ---- integers of known size ------------------------------------------- */

#if defined(HAVE_STDINT_H)
#  include <stdint.h>
#elif defined(HAVE_INTTYPES_H)	/* Solaris 8, HP-UX, IRIX */
#  include <inttypes.h>
#elif defined(_MSC_VER)
typedef unsigned __int8  uint8_t;
typedef unsigned __int16 uint16_t;
typedef unsigned __int32 uint32_t;
typedef unsigned __int64 uint64_t;
typedef __int32          int32_t;
typedef __int64          int64_t;
#else
typedef unsigned char    uint8_t;
typedef unsigned short   uint16_t;
#  if SIZEOF_INT == 4
typedef unsigned int     uint32_t;
typedef int              int32_t;
#  else
typedef unsigned long    uint32_t;
typedef long             int32_t;
#  endif
#endif

#ifdef _MSC_VER
#  define FMT_I64 "I64d"
#elif defined(__alpha) || defined(__LP64__) || defined(_LP64)
#  define FMT_I64 "ld"
#else
#  define FMT_I64 "lld"
#endif

/* ---- compiler ---------------------------------------------------------- */

#if defined(__GNUC__) && (__GNUC__ > 2 || (__GNUC__ == 2 && __GNUC_MINOR__ >= 7))
#  define PRINTF_LIKE(f, a) __attribute__((__format__(__printf__, f, a)))
#  define NORETURN          __attribute__((__noreturn__))
#else
#  define PRINTF_LIKE(f, a)
#  define NORETURN
#endif

#if defined(__STDC_VERSION__) && __STDC_VERSION__ >= 199901L
#  define INLINE static inline
#elif defined(__GNUC__) || defined(_MSC_VER)
#  define INLINE static __inline
#else
#  define INLINE static
#endif

#ifdef __cplusplus
#  define BEGIN_C_DECLS extern "C" {
#  define END_C_DECLS   }
#else
#  define BEGIN_C_DECLS
#  define END_C_DECLS
#endif

/* ---- files -------------------------------------------------------------- */

#ifdef OS_UNIX
#  include <unistd.h>
#  define DIR_SEP       '/'
#  define IS_DIR_SEP(c) ((c) == '/')
#  define PATH_LIST_SEP ':'
#else
#  include <io.h>
#  define DIR_SEP       '\\'
#  define IS_DIR_SEP(c) ((c) == '/' || (c) == '\\' || (c) == ':')
#  define PATH_LIST_SEP ';'
#endif

#ifndef O_BINARY
#  ifdef _O_BINARY
#    define O_BINARY _O_BINARY
#  else
#    define O_BINARY 0
#  endif
#endif

#ifdef OS_WIN32
#  define mkdir(path, mode) _mkdir(path)
#  define popen             _popen
#  define pclose            _pclose
#  define snprintf          _snprintf	/* does not terminate on overflow! */
#  define strcasecmp        _stricmp
#  define strncasecmp       _strnicmp
#  define sleep(s)          Sleep((s) * 1000)
#elif !defined(HAVE_STRCASECMP) && defined(HAVE_STRICMP)
#  define strcasecmp        stricmp
#  define strncasecmp       strnicmp
#endif

#ifndef S_ISDIR
#  define S_ISDIR(m) (((m) & S_IFMT) == S_IFDIR)
#endif
#ifndef MAXPATHLEN
#  if defined(PATH_MAX)
#    define MAXPATHLEN PATH_MAX
#  elif defined(_MAX_PATH)
#    define MAXPATHLEN _MAX_PATH
#  else
#    define MAXPATHLEN 1024
#  endif
#endif

/* ---- sockets ------------------------------------------------------------- */

#ifdef OS_WIN32
#  include <winsock2.h>
typedef SOCKET sock_t;
typedef int    socklen_t;
#  define SOCK_BAD         INVALID_SOCKET
#  define sock_close(s)    closesocket(s)
#  define sock_errno()     WSAGetLastError()
#  define SOCK_WOULDBLOCK  WSAEWOULDBLOCK
#else
#  include <sys/types.h>
#  include <sys/socket.h>
#  include <netinet/in.h>
#  include <errno.h>
typedef int sock_t;
#  define SOCK_BAD         (-1)
#  define sock_close(s)    close(s)
#  define sock_errno()     errno
#  define SOCK_WOULDBLOCK  EWOULDBLOCK
#  ifdef OS_SUNOS4
typedef int socklen_t;
#  elif !defined(HAVE_SOCKLEN_T)
#    ifdef __hpux
typedef int socklen_t;
#    else
typedef size_t socklen_t;	/* AIX 4.1 */
#    endif
#  endif
#endif

#if !defined(MSG_NOSIGNAL)
#  define MSG_NOSIGNAL 0	/* and SIGPIPE is ignored in main() instead */
#endif

/* ---- what some C libraries forgot ------------------------------------------ */

BEGIN_C_DECLS

#ifndef HAVE_STRLCPY
size_t strlcpy(char *dst, const char *src, size_t size);
#endif
#ifndef HAVE_STRSEP
char *strsep(char **stringp, const char *delim);
#endif
#ifndef HAVE_GETOPT
extern char *optarg;
extern int   optind, opterr;
int getopt(int argc, char *const argv[], const char *opts);
#endif
#if defined(OS_WIN32) || defined(OS_DOS)
int fsync(int fd);
#endif

END_C_DECLS

#endif /* DORY_SYSDEP_H */
