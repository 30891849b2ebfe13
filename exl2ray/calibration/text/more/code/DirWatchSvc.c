/*++

Module Name:

    DirWatchSvc.c

Abstract:

    Service that watches a drop folder and moves every finished scan into a dated subfolder.
    A scan counts as finished when it can be opened without sharing, i.e. the scanner let go of it.

Environment:

    User mode only. Runs as NetworkService; needs Modify on the drop folder, nothing else.

--*/

#define UNICODE
#define _UNICODE
#include <windows.h>
#include <pathcch.h>
#include <strsafe.h>

#define SVC_NAME            L"ScanSorter"
#define NOTIFY_BUFFER_SIZE  (64 * 1024)     // larger fails on redirected drives
#define SETTLE_MS           2500
#define STOP_HINT_MS        5000

typedef struct _SVC_CONTEXT {
    SERVICE_STATUS_HANDLE StatusHandle;
    SERVICE_STATUS        Status;
    HANDLE                StopEvent;
    HANDLE                Directory;
    OVERLAPPED            Overlapped;
    WCHAR                 DropPath[MAX_PATH];
    DECLSPEC_ALIGN(8) BYTE NotifyBuffer[NOTIFY_BUFFER_SIZE];
} SVC_CONTEXT, *PSVC_CONTEXT;

static SVC_CONTEXT g_Svc;

static VOID
ReportState(
    _In_ DWORD State,
    _In_ DWORD ExitCode,
    _In_ DWORD WaitHint
    )
{
    static DWORD CheckPoint = 1;

    g_Svc.Status.dwCurrentState  = State;
    g_Svc.Status.dwWin32ExitCode = ExitCode;
    g_Svc.Status.dwWaitHint      = WaitHint;
    g_Svc.Status.dwControlsAccepted =
        (State == SERVICE_START_PENDING) ? 0 : SERVICE_ACCEPT_STOP | SERVICE_ACCEPT_SHUTDOWN;
    g_Svc.Status.dwCheckPoint =
        (State == SERVICE_RUNNING || State == SERVICE_STOPPED) ? 0 : CheckPoint++;
    SetServiceStatus(g_Svc.StatusHandle, &g_Svc.Status);
}

static DWORD WINAPI
ControlHandler(
    _In_ DWORD Control,
    _In_ DWORD EventType,
    _In_ LPVOID EventData,
    _In_ LPVOID Context
    )
{
    UNREFERENCED_PARAMETER(EventType);
    UNREFERENCED_PARAMETER(EventData);
    UNREFERENCED_PARAMETER(Context);

    switch (Control) {
    case SERVICE_CONTROL_STOP:
    case SERVICE_CONTROL_SHUTDOWN:
        ReportState(SERVICE_STOP_PENDING, NO_ERROR, STOP_HINT_MS);
        SetEvent(g_Svc.StopEvent);
        return NO_ERROR;
    case SERVICE_CONTROL_INTERROGATE:
        return NO_ERROR;
    default:
        return ERROR_CALL_NOT_IMPLEMENTED;
    }
}

static DWORD
LoadDropPath(
    VOID
    )
{
    DWORD cb = sizeof(g_Svc.DropPath);

    // RRF_RT_REG_SZ also takes care of the missing terminator some installers leave behind.
    return RegGetValueW(HKEY_LOCAL_MACHINE,
                        L"SYSTEM\\CurrentControlSet\\Services\\" SVC_NAME L"\\Parameters",
                        L"DropPath", RRF_RT_REG_SZ, NULL, g_Svc.DropPath, &cb);
}

static VOID
LogFailure(
    _In_ HRESULT Result,
    _In_ LPCWSTR FileName
    )
{
    WCHAR   Line[MAX_PATH + 64];
    LPCWSTR Strings[1] = { Line };
    HANDLE  Log = RegisterEventSourceW(NULL, SVC_NAME);

    if (Log == NULL)
        return;
    if (SUCCEEDED(StringCchPrintfW(Line, ARRAYSIZE(Line), L"%s: 0x%08lx", FileName, (ULONG)Result)))
        ReportEventW(Log, EVENTLOG_WARNING_TYPE, 0, 1001, NULL, 1, 0, Strings, NULL);
    DeregisterEventSource(Log);
}

//
// Returns S_FALSE if the file is still being written.
//
static HRESULT
MoveIfFinished(
    _In_ const WIN32_FIND_DATAW *Find
    )
{
    WCHAR      Source[MAX_PATH], Target[MAX_PATH], Day[16];
    SYSTEMTIME Utc, Local;
    HANDLE     File;
    HRESULT    hr;

    if (Find->dwFileAttributes & (FILE_ATTRIBUTE_DIRECTORY | FILE_ATTRIBUTE_HIDDEN))
        return S_OK;

    hr = PathCchCombine(Source, ARRAYSIZE(Source), g_Svc.DropPath, Find->cFileName);
    if (FAILED(hr))
        return hr;

    File = CreateFileW(Source, GENERIC_READ | DELETE, 0, NULL, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, NULL);
    if (File == INVALID_HANDLE_VALUE) {
        DWORD Error = GetLastError();
        if (Error == ERROR_SHARING_VIOLATION)
            return S_FALSE;
        return Error == ERROR_FILE_NOT_FOUND ? S_OK : HRESULT_FROM_WIN32(Error);
    }
    CloseHandle(File);

    FileTimeToSystemTime(&Find->ftLastWriteTime, &Utc);
    SystemTimeToTzSpecificLocalTime(NULL, &Utc, &Local);
    hr = StringCchPrintfW(Day, ARRAYSIZE(Day), L"%04u-%02u-%02u", Local.wYear, Local.wMonth, Local.wDay);
    if (FAILED(hr))
        return hr;

    hr = PathCchCombine(Target, ARRAYSIZE(Target), g_Svc.DropPath, Day);
    if (FAILED(hr))
        return hr;
    if (!CreateDirectoryW(Target, NULL) && GetLastError() != ERROR_ALREADY_EXISTS)
        return HRESULT_FROM_WIN32(GetLastError());

    hr = PathCchAppend(Target, ARRAYSIZE(Target), Find->cFileName);
    if (FAILED(hr))
        return hr;

    // No MOVEFILE_REPLACE_EXISTING: the scanner restarts its counter at 0001 every morning.
    if (!MoveFileExW(Source, Target, 0)) {
        if (GetLastError() != ERROR_ALREADY_EXISTS && GetLastError() != ERROR_FILE_EXISTS)
            return HRESULT_FROM_WIN32(GetLastError());
        hr = StringCchPrintfW(Target, ARRAYSIZE(Target), L"%s\\%s\\%08lx_%s",
                              g_Svc.DropPath, Day, Find->ftLastWriteTime.dwLowDateTime, Find->cFileName);
        if (FAILED(hr))
            return hr;
        if (!MoveFileExW(Source, Target, 0))
            return HRESULT_FROM_WIN32(GetLastError());
    }
    return S_OK;
}

static BOOL
SweepFolder(
    VOID
    )
{
    WCHAR            Pattern[MAX_PATH];
    WIN32_FIND_DATAW Find;
    HANDLE           Search;
    BOOL             Again = FALSE;

    if (FAILED(PathCchCombine(Pattern, ARRAYSIZE(Pattern), g_Svc.DropPath, L"*.pdf")))
        return FALSE;

    Search = FindFirstFileW(Pattern, &Find);
    if (Search == INVALID_HANDLE_VALUE)
        return FALSE;
    do {
        HRESULT hr = MoveIfFinished(&Find);
        if (hr == S_FALSE)
            Again = TRUE;
        else if (FAILED(hr))
            LogFailure(hr, Find.cFileName);
    } while (FindNextFileW(Search, &Find));
    FindClose(Search);
    return Again;
}

static DWORD
WatchLoop(
    VOID
    )
{
    HANDLE Waits[2] = { g_Svc.StopEvent, g_Svc.Overlapped.hEvent };
    DWORD  Timeout = SETTLE_MS;             // first pass picks up what arrived while we were down

    for (;;) {
        DWORD Bytes;

        if (!ReadDirectoryChangesW(g_Svc.Directory, g_Svc.NotifyBuffer, NOTIFY_BUFFER_SIZE, FALSE,
                                   FILE_NOTIFY_CHANGE_FILE_NAME | FILE_NOTIFY_CHANGE_LAST_WRITE,
                                   NULL, &g_Svc.Overlapped, NULL))
            return GetLastError();

        for (;;) {
            DWORD Wait = WaitForMultipleObjects(ARRAYSIZE(Waits), Waits, FALSE, Timeout);

            if (Wait == WAIT_OBJECT_0) {
                CancelIoEx(g_Svc.Directory, &g_Svc.Overlapped);
                GetOverlappedResult(g_Svc.Directory, &g_Svc.Overlapped, &Bytes, TRUE);
                return NO_ERROR;
            }
            if (Wait == WAIT_TIMEOUT) {
                Timeout = SweepFolder() ? SETTLE_MS : INFINITE;
                continue;
            }
            if (Wait != WAIT_OBJECT_0 + 1)
                return GetLastError();
            break;
        }
        if (!GetOverlappedResult(g_Svc.Directory, &g_Svc.Overlapped, &Bytes, FALSE))
            return GetLastError();
        // Bytes == 0 means the buffer overflowed. We never look at the names, so it does not matter.
        ResetEvent(g_Svc.Overlapped.hEvent);
        Timeout = SETTLE_MS;
    }
}

static VOID WINAPI
ServiceMain(
    _In_ DWORD argc,
    _In_ LPWSTR *argv
    )
{
    DWORD Error;

    UNREFERENCED_PARAMETER(argc);
    UNREFERENCED_PARAMETER(argv);

    g_Svc.Status.dwServiceType = SERVICE_WIN32_OWN_PROCESS;
    g_Svc.Directory = INVALID_HANDLE_VALUE;
    g_Svc.StatusHandle = RegisterServiceCtrlHandlerExW(SVC_NAME, ControlHandler, NULL);
    if (g_Svc.StatusHandle == NULL)
        return;
    ReportState(SERVICE_START_PENDING, NO_ERROR, STOP_HINT_MS);

    Error = LoadDropPath();
    if (Error != NO_ERROR)
        goto Cleanup;

    g_Svc.StopEvent = CreateEventW(NULL, TRUE, FALSE, NULL);
    g_Svc.Overlapped.hEvent = CreateEventW(NULL, TRUE, FALSE, NULL);
    if (g_Svc.StopEvent == NULL || g_Svc.Overlapped.hEvent == NULL) {
        Error = GetLastError();
        goto Cleanup;
    }
    g_Svc.Directory = CreateFileW(g_Svc.DropPath, FILE_LIST_DIRECTORY,
                                  FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE, NULL, OPEN_EXISTING,
                                  FILE_FLAG_BACKUP_SEMANTICS | FILE_FLAG_OVERLAPPED, NULL);
    if (g_Svc.Directory == INVALID_HANDLE_VALUE) {
        Error = GetLastError();
        goto Cleanup;
    }
    ReportState(SERVICE_RUNNING, NO_ERROR, 0);
    Error = WatchLoop();

Cleanup:
    if (g_Svc.Directory != INVALID_HANDLE_VALUE)
        CloseHandle(g_Svc.Directory);
    if (g_Svc.Overlapped.hEvent != NULL)
        CloseHandle(g_Svc.Overlapped.hEvent);
    // StopEvent stays open: a second stop request may still be on its way to the handler.
    ReportState(SERVICE_STOPPED, Error, 0);
}

int __cdecl
wmain(
    VOID
    )
{
    static const SERVICE_TABLE_ENTRYW Table[] = {
        { (LPWSTR)SVC_NAME, ServiceMain },
        { NULL, NULL }
    };

    return StartServiceCtrlDispatcherW(Table) ? 0 : (int)GetLastError();
}
