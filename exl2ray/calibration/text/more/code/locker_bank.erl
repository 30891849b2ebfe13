%%% One process per left-luggage locker bank. Doors are opened by a six-digit code printed on a slip.
%%% The hardware speaks through a port program; when that program dies the bank restarts it, and no door
%%% changes state, because a locker that opens by accident is worse than one that stays shut.
-module(locker_bank).
-behaviour(gen_statem).

-export([start_link/2, rent/2, open/2, vacate/2, occupancy/1]).
-export([init/1, callback_mode/0, terminate/3]).
-export([online/3, offline/3]).

-include_lib("kernel/include/logger.hrl").

-record(locker, {
    no     :: pos_integer(),
    size   :: small | large,
    since  :: undefined | integer(),
    digest :: undefined | binary(),
    tries = 0 :: non_neg_integer()
}).

-record(data, {
    bank         :: atom(),
    driver       :: file:filename(),
    port         :: undefined | port(),
    lockers = #{} :: #{pos_integer() => #locker{}},
    pending = #{} :: #{reference() => {gen_statem:from(), pos_integer()}},
    backoff = 500 :: pos_integer()
}).

-define(MAX_TRIES, 5).
-define(DOOR_TIMEOUT, 4000).

start_link(Bank, Opts) ->
    gen_statem:start_link({local, Bank}, ?MODULE, {Bank, Opts}, []).

-spec rent(atom(), small | large) -> {ok, pos_integer(), binary()} | {error, full | offline}.
rent(Bank, Size)       -> gen_statem:call(Bank, {rent, Size}).
open(Bank, Code)       -> gen_statem:call(Bank, {open, Code, keep}, ?DOOR_TIMEOUT + 1000).
vacate(Bank, Code)     -> gen_statem:call(Bank, {open, Code, release}, ?DOOR_TIMEOUT + 1000).
occupancy(Bank)        -> gen_statem:call(Bank, occupancy).

callback_mode() -> [state_functions, state_enter].

init({Bank, #{driver := Driver, sizes := Sizes}}) ->
    process_flag(trap_exit, true),
    Lockers = #{N => #locker{no = N, size = S} || {N, S} <- lists:enumerate(Sizes)},
    {ok, offline, #data{bank = Bank, driver = Driver, lockers = restore(Bank, Lockers)}}.

%% --- offline: the port program is not running ---------------------------------------------------------

offline(enter, _Old, #data{backoff = B} = D) ->
    {keep_state, D, [{state_timeout, B, reconnect}]};
offline(state_timeout, reconnect, #data{driver = Driver, backoff = B} = D) ->
    try open_port({spawn_executable, Driver}, [{packet, 2}, binary, exit_status, use_stdio]) of
        Port -> {next_state, online, D#data{port = Port}}
    catch
        error:Reason ->
            ?LOG_ERROR("~p: cannot start ~ts: ~p", [D#data.bank, Driver, Reason]),
            {repeat_state, D#data{backoff = min(B * 2, 60_000)}}
    end;
offline({call, From}, occupancy, D) ->
    {keep_state_and_data, [{reply, From, count(D)}]};
offline({call, From}, _Request, _D) ->
    {keep_state_and_data, [{reply, From, {error, offline}}]};
offline(info, _Late, _D) ->
    keep_state_and_data.

%% --- online -------------------------------------------------------------------------------------------

online(enter, offline, D) ->
    {keep_state, D, [{{timeout, settle}, 30_000, ok}]};
online({timeout, settle}, ok, D) ->
    %% half a minute without a crash: trust it again
    {keep_state, D#data{backoff = 500}};

online({call, From}, occupancy, D) ->
    {keep_state_and_data, [{reply, From, count(D)}]};

online({call, From}, {rent, Size}, #data{lockers = Ls} = D) ->
    Free = [L || #locker{size = S, since = undefined} = L <- maps:values(Ls), S =:= Size],
    case Free of
        [] ->
            {keep_state_and_data, [{reply, From, {error, full}}]};
        _ ->
            %% the one that has been used least lately wears out last; a random one is nearly as good
            #locker{no = N} = L = lists:nth(rand:uniform(length(Free)), Free),
            Code = fresh_code(Ls),
            L1 = L#locker{since = erlang:system_time(second), digest = digest(Code), tries = 0},
            D1 = store(L1, D),
            send(D1, {unlock, N}),
            {keep_state, D1, [{reply, From, {ok, N, Code}}]}
    end;

online({call, From}, {open, Code, What}, #data{lockers = Ls, pending = P} = D) ->
    case find(digest(Code), maps:values(Ls)) of
        #locker{tries = T} when T >= ?MAX_TRIES ->
            {keep_state_and_data, [{reply, From, {error, see_attendant}}]};
        #locker{no = N} ->
            Ref = make_ref(),
            send(D, {unlock, N}),
            {keep_state, D#data{pending = P#{Ref => {From, N, What}}},
             [{{timeout, Ref}, ?DOOR_TIMEOUT, stuck}]};
        none ->
            {keep_state_and_data, [{reply, From, {error, wrong_code}}]}
    end;

online({timeout, Ref}, stuck, #data{pending = P} = D) when is_map_key(Ref, P) ->
    {{From, N, _What}, Rest} = maps:take(Ref, P),
    #{N := L} = D#data.lockers,
    ?LOG_WARNING("~p: door ~b does not open", [D#data.bank, N]),
    {keep_state, store(L#locker{tries = L#locker.tries + 1}, D#data{pending = Rest}),
     [{reply, From, {error, stuck}}]};

online(info, {Port, {data, Bin}}, #data{port = Port} = D) ->
    door_event(binary_to_term(Bin, [safe]), D);
online(info, {Port, {exit_status, Status}}, #data{port = Port, pending = P, backoff = B} = D) ->
    ?LOG_ERROR("~p: driver left with status ~b", [D#data.bank, Status]),
    Replies = [{reply, From, {error, offline}} || {From, _, _} <- maps:values(P)],
    {next_state, offline, D#data{port = undefined, pending = #{}, backoff = min(B * 2, 60_000)}, Replies};
online(info, _Other, _D) ->
    keep_state_and_data.

door_event({opened, N}, #data{pending = P} = D) ->
    case [{Ref, From, What} || {Ref, {From, M, What}} <- maps:to_list(P), M =:= N] of
        [{Ref, From, What} | _] ->
            #{N := L} = D#data.lockers,
            L1 = case What of
                     release -> #locker{no = N, size = L#locker.size};
                     keep    -> L#locker{tries = 0}
                 end,
            {keep_state, store(L1, D#data{pending = maps:remove(Ref, P)}),
             [{reply, From, {ok, N}}, {{timeout, Ref}, infinity, stuck}]};
        [] ->
            keep_state_and_data
    end;
door_event({forced, N}, D) ->
    ?LOG_ALERT("~p: door ~b was forced", [D#data.bank, N]),
    keep_state_and_data.

terminate(_Reason, _State, #data{bank = Bank}) ->
    dets:close(Bank).

%% --- helpers ------------------------------------------------------------------------------------------

fresh_code(Ls) ->
    Code = iolist_to_binary(io_lib:format("~6..0b", [rand:uniform(1_000_000) - 1])),
    case find(digest(Code), maps:values(Ls)) of
        none -> Code;
        _    -> fresh_code(Ls)
    end.

digest(Code) -> crypto:hash(sha256, [<<"locker">>, Code]).

find(_, [])                                    -> none;
find(Digest, [#locker{digest = Digest} = L | _]) -> L;
find(Digest, [_ | T])                          -> find(Digest, T).

send(#data{port = Port}, Msg) -> port_command(Port, term_to_binary(Msg)).

store(#locker{no = N} = L, #data{bank = Bank, lockers = Ls} = D) ->
    ok = dets:insert(Bank, L),
    D#data{lockers = Ls#{N := L}}.

restore(Bank, Fresh) ->
    {ok, Bank} = dets:open_file(Bank, [{keypos, #locker.no}]),
    dets:foldl(fun(#locker{no = N} = L, Acc) -> Acc#{N => L} end, Fresh, Bank).

count(#data{lockers = Ls}) ->
    maps:groups_from_list(fun(#locker{since = S}) -> if S =:= undefined -> free; true -> taken end end,
                          fun(#locker{no = N}) -> N end,
                          maps:values(Ls)).
