/*
 * A PKCS#11 2.40 module over another one, which misbehaves as a file says. tests/support/bad_module.rs builds it.
 *
 *   -DREAL='"/path/to/module.so"'   the module that does the work
 *   -DMOODS='"/path/to/file"'       what goes wrong
 *   -DCALLS='"/path/to/file"'       gets a line `FUNCTION RESULT` for each call below, where the file exists
 *
 * The file of moods is read at each call, so that it works where the environment is cleared, and can be changed while the
 * module is loaded. A line is `FUNCTION MOOD`, or `FUNCTION MOOD @N` for calls whose first argument (a slot, a session) is
 * N only; of C_GetAttributeValue for private keys whose CKA_ID is the byte N, or 256 + N for their public keys:
 *
 *   hang        never returns                       crash     a segmentation fault
 *   exit        ends the process                    slow=MS   sleeps first
 *   fail=RV     returns RV, in hexadecimal          wrong     flips the last bit of a signature
 *   serial      of C_GetTokenInfo: all tokens say the same serial number
 *   final       of C_GetTokenInfo: CKF_USER_PIN_FINAL_TRY is set
 */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long word;

/* The places of functions in the list of 2.40, C_Initialize being the first. */
enum {
	INITIALIZE = 0, GET_SLOT_LIST = 4, GET_TOKEN_INFO = 6, OPEN_SESSION = 12, LOGIN = 18, GET_ATTRIBUTE_VALUE = 24,
	FIND_OBJECTS_INIT = 26, DECRYPT = 34, SIGN = 43, SIGN_FINAL = 45, GENERATE_KEY_PAIR = 59, FUNCTIONS = 68,
};

typedef struct {
	unsigned char version[2];
	void *function[FUNCTIONS];
} __attribute__((aligned(sizeof(void *)))) function_list;

static function_list mine, real;

enum { SERIAL_OFFSET = 80, SERIAL_LENGTH = 16, FLAGS_OFFSET = 96, FINAL_TRY = 0x20000 }; /* of CK_TOKEN_INFO */

/* What a result is changed into. */
typedef struct {
	int wrong, serial, final;
} lies;

/* Does what the file says for this call. Returns 1 when the call is over, with its result in rv. */
static int before(const char *function, word first, word *rv, lies *lies)
{
	char line[256], name[64], mood[64], only[64];
	FILE *file = fopen(MOODS, "r");

	memset(lies, 0, sizeof *lies);
	while (file && fgets(line, sizeof line, file)) {
		int words = sscanf(line, "%63s %63s %63s", name, mood, only);
		if (words < 2 || strcmp(name, function))
			continue;
		if (words == 3 && (only[0] != '@' || strtoul(only + 1, NULL, 10) != first))
			continue;
		if (!strcmp(mood, "hang"))
			for (;;)
				pause();
		if (!strcmp(mood, "crash"))
			*(volatile int *)0 = 1;
		if (!strcmp(mood, "exit"))
			_exit(3);
		if (!strncmp(mood, "slow=", 5))
			usleep(1000 * (useconds_t)atoi(mood + 5));
		if (!strncmp(mood, "fail=", 5)) {
			*rv = strtoul(mood + 5, NULL, 16);
			fclose(file);
			return 1;
		}
		lies->wrong |= !strcmp(mood, "wrong");
		lies->serial |= !strcmp(mood, "serial");
		lies->final |= !strcmp(mood, "final");
	}
	if (file)
		fclose(file);
	return 0;
}

static word after(const char *function, word rv)
{
	char line[96];
	int length = snprintf(line, sizeof line, "%s %lx\n", function, rv), file = open(CALLS, O_WRONLY | O_APPEND);

	/* In one piece: several processes may call at a time. */
	if (file >= 0) {
		if (write(file, line, length) != length)
			abort();
		close(file);
	}
	return rv;
}

/* The CKA_ID of a key where that is one byte, and 256 more for a public key; or else 0. */
static word id_of(word session, word object)
{
	unsigned char id[64];
	word class = 0;
	struct { word type; void *value; word length; } attributes[] = {
		{ 0x102 /* CKA_ID */, id, sizeof id }, { 0x0 /* CKA_CLASS */, &class, sizeof class },
	};
	word (*get)(word, word, void *, word) = (word(*)(word, word, void *, word))real.function[GET_ATTRIBUTE_VALUE];

	if (get(session, object, attributes, 2) || attributes[0].length != 1 || class < 2 || class > 3)
		return 0;
	return id[0] + (class == 2 /* CKO_PUBLIC_KEY */ ? 256 : 0);
}

/* Changes what C_GetTokenInfo says. */
static void describe(const lies *lies, unsigned char *info)
{
	word flags;

	if (lies->serial)
		memcpy(info + SERIAL_OFFSET, "5eed5eed5eed5eed", SERIAL_LENGTH);
	memcpy(&flags, info + FLAGS_OFFSET, sizeof flags);
	flags |= lies->final ? FINAL_TRY : 0;
	memcpy(info + FLAGS_OFFSET, &flags, sizeof flags);
}

static void flip(const lies *lies, unsigned char *signature, const word *length)
{
	if (lies->wrong && signature && *length)
		signature[*length - 1] ^= 1;
}

#define WRAP(name, place, parameters, arguments, first, then)                     \
	static word name parameters                                               \
	{                                                                         \
		lies lies;                                                        \
		word rv;                                                          \
		if (!before(#name, (word)(first), &rv, &lies)) {                  \
			rv = ((word(*) parameters)real.function[place])arguments; \
			if (rv == 0)                                              \
				then;                                             \
		}                                                                 \
		return after(#name, rv);                                          \
	}

#define NOTHING (void)lies

WRAP(C_Initialize, INITIALIZE, (void *a), (a), 0, NOTHING)
WRAP(C_GetSlotList, GET_SLOT_LIST, (unsigned char a, word *b, word *c), (a, b, c), 0, NOTHING)
WRAP(C_GetTokenInfo, GET_TOKEN_INFO, (word a, unsigned char *b), (a, b), a, describe(&lies, b))
WRAP(C_OpenSession, OPEN_SESSION, (word a, word b, void *c, void *d, word *e), (a, b, c, d, e), a, NOTHING)
WRAP(C_Login, LOGIN, (word a, word b, unsigned char *c, word d), (a, b, c, d), a, NOTHING)
WRAP(C_GetAttributeValue, GET_ATTRIBUTE_VALUE, (word a, word b, void *c, word d), (a, b, c, d), id_of(a, b), NOTHING)
WRAP(C_FindObjectsInit, FIND_OBJECTS_INIT, (word a, void *b, word c), (a, b, c), a, NOTHING)
WRAP(C_Decrypt, DECRYPT, (word a, unsigned char *b, word c, unsigned char *d, word *e), (a, b, c, d, e), a, NOTHING)
WRAP(C_Sign, SIGN, (word a, unsigned char *b, word c, unsigned char *d, word *e), (a, b, c, d, e), a, flip(&lies, d, e))
WRAP(C_SignFinal, SIGN_FINAL, (word a, unsigned char *b, word *c), (a, b, c), a, flip(&lies, b, c))
WRAP(C_GenerateKeyPair, GENERATE_KEY_PAIR, (word a, void *b, void *c, word d, void *e, word f, word *g, word *h),
     (a, b, c, d, e, f, g, h), a, NOTHING)

word C_GetFunctionList(function_list **out)
{
	void *library = dlopen(REAL, RTLD_NOW | RTLD_LOCAL);
	word (*get)(function_list **) = library ? (word(*)(function_list **))dlsym(library, "C_GetFunctionList") : NULL;
	function_list *list;

	if (!get || get(&list))
		return 5; /* CKR_GENERAL_ERROR */
	real = mine = *list;
	mine.function[INITIALIZE] = (void *)C_Initialize;
	mine.function[GET_SLOT_LIST] = (void *)C_GetSlotList;
	mine.function[GET_TOKEN_INFO] = (void *)C_GetTokenInfo;
	mine.function[OPEN_SESSION] = (void *)C_OpenSession;
	mine.function[LOGIN] = (void *)C_Login;
	mine.function[GET_ATTRIBUTE_VALUE] = (void *)C_GetAttributeValue;
	mine.function[FIND_OBJECTS_INIT] = (void *)C_FindObjectsInit;
	mine.function[DECRYPT] = (void *)C_Decrypt;
	mine.function[SIGN] = (void *)C_Sign;
	mine.function[SIGN_FINAL] = (void *)C_SignFinal;
	mine.function[GENERATE_KEY_PAIR] = (void *)C_GenerateKeyPair;
	*out = &mine;
	return 0;
}
