/* console.c - for ports.t: runs a program at a console of Windows and types there.
 *
 *     console.exe KEYS OUT COMMAND
 *
 * COMMAND's stdin is a console, stdout the file OUT. Of the file KEYS each line is typed, in UTF-8;
 * a line ^C waits until OUT has grown and then interrupts. The exit code is COMMAND's.
 *
 * A console without a window is a pseudo console, and only a child of who made it is in it: so
 * this program starts itself once more (KEYS is then preceded by --). */
#if !defined(NTDDI_VERSION)
#define NTDDI_VERSION 0x0A000006 /* the first Windows with pseudo consoles */
#endif
#include <windows.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if !defined(PROC_THREAD_ATTRIBUTE_PSEUDOCONSOLE) /* older headers */
#define PROC_THREAD_ATTRIBUTE_PSEUDOCONSOLE 0x20016
typedef void *HPCON;
HRESULT WINAPI CreatePseudoConsole(COORD, HANDLE, HANDLE, DWORD, HPCON *);
#endif

enum { PATIENCE = 20000 }; /* ms */

static void fail(const char *what)
{
    fprintf(stderr, "console.exe: %s: error %lu\n", what, GetLastError());
    exit(99);
}

static DWORD WINAPI swallow(void *pipe)
{
    char bytes[4096];
    for (DWORD n = 1; n && ReadFile(pipe, bytes, sizeof bytes, &n, NULL);) {}
    return 0;
}

static int exit_code_of(HANDLE process)
{
    DWORD code = 98;
    if (WaitForSingleObject(process, PATIENCE)) TerminateProcess(process, 97);
    GetExitCodeProcess(process, &code);
    return (int)code;
}

/* Makes the console and starts this program in it. */
static int make_console(const wchar_t *arguments)
{
    static wchar_t command[4096], path[4096];
    HANDLE keys_out, keys_in, screen_out, screen_in;
    HPCON console;
    SIZE_T n = 0;
    STARTUPINFOEXW start = {.StartupInfo.cb = sizeof start,
                            .StartupInfo.dwFlags = STARTF_USESTDHANDLES};
    PROCESS_INFORMATION self;
    if (!CreatePipe(&keys_out, &keys_in, NULL, 0) ||
        !CreatePipe(&screen_out, &screen_in, NULL, 0) ||
        CreatePseudoConsole((COORD){200, 50}, keys_out, screen_in, 0, &console))
        fail("no console");
    CreateThread(NULL, 0, swallow, screen_out, 0, NULL);
    InitializeProcThreadAttributeList(NULL, 1, 0, &n);
    start.lpAttributeList = malloc(n);
    if (!start.lpAttributeList ||
        !InitializeProcThreadAttributeList(start.lpAttributeList, 1, 0, &n) ||
        !UpdateProcThreadAttribute(start.lpAttributeList, 0, PROC_THREAD_ATTRIBUTE_PSEUDOCONSOLE,
                                   console, sizeof console, NULL, NULL)) fail("no attributes");
    wcscpy(command, L"console.exe -- ");
    wcsncat(command, arguments, 4000);
    GetModuleFileNameW(NULL, path, 4096);
    if (!CreateProcessW(path, command, NULL, NULL, FALSE, EXTENDED_STARTUPINFO_PRESENT, NULL, NULL,
                        &start.StartupInfo, &self)) fail("console.exe");
    return exit_code_of(self.hProcess);
}

static BOOL WINAPI ignore_interrupts(DWORD event) { return event == CTRL_C_EVENT; }

static void type(HANDLE console, const char *line)
{
    wchar_t wide[4096];
    DWORD n;
    MultiByteToWideChar(CP_UTF8, 0, line, -1, wide, 4096);
    for (wchar_t *c = wide; *c; c++)
        for (int down = 1; down >= 0; down--) {
            INPUT_RECORD key = {.EventType = KEY_EVENT};
            key.Event.KeyEvent.bKeyDown = down;
            key.Event.KeyEvent.wRepeatCount = 1;
            key.Event.KeyEvent.wVirtualKeyCode = *c == '\n' ? VK_RETURN : 0;
            key.Event.KeyEvent.uChar.UnicodeChar = *c == '\n' ? '\r' : *c;
            if (!WriteConsoleInputW(console, &key, 1, &n)) fail("typing");
        }
}

static int type_all(const char *keys, const char *out, wchar_t *command)
{
    SECURITY_ATTRIBUTES heritable = {sizeof heritable, NULL, TRUE};
    FILE *f = fopen(keys, "r");
    DWORD mode = GENERIC_READ | GENERIC_WRITE;
    HANDLE console = CreateFileA("CONIN$", mode, 3, &heritable, OPEN_EXISTING, 0, NULL);
    HANDLE screen = CreateFileA("CONOUT$", mode, 3, &heritable, OPEN_EXISTING, 0, NULL);
    HANDLE file = CreateFileA(out, mode, 3, &heritable, CREATE_ALWAYS, 0, NULL);
    STARTUPINFOW start = {.cb = sizeof start, .dwFlags = STARTF_USESTDHANDLES, .hStdInput = console,
                          .hStdOutput = file, .hStdError = screen};
    PROCESS_INFORMATION child;
    char line[4096];
    DWORD length = 0;
    if (!f || console == INVALID_HANDLE_VALUE || file == INVALID_HANDLE_VALUE) fail("no file");
    SetConsoleCtrlHandler(ignore_interrupts, TRUE);
    if (!CreateProcessW(NULL, command, NULL, NULL, TRUE, 0, NULL, NULL, &start, &child))
        fail("the command");
    while (fgets(line, sizeof line, f)) {
        if (strcmp(line, "^C\n")) type(console, line);
        if (strcmp(line, "^C\n")) continue;
        for (int ms = 0; ms < PATIENCE / 2 && GetFileSize(file, NULL) == length; ms += 50)
            Sleep(50);
        GenerateConsoleCtrlEvent(CTRL_C_EVENT, 0);
        Sleep(500); /* what it had computed comes out */
        length = GetFileSize(file, NULL);
    }
    return exit_code_of(child.hProcess);
}

int main(int argc, char **argv)
{
    wchar_t *arguments = wcschr(GetCommandLineW(), L' ');
    if (argc < 4 || !arguments) return 96;
    if (strcmp(argv[1], "--")) return make_console(arguments + 1);
    for (int i = 0; i < 3; i++) arguments = wcschr(arguments + 1, L' ');
    return type_all(argv[2], argv[3], arguments + 1);
}
