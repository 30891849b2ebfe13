" Vim syntax, indent and a few commands for seed exchange lists (*.seeds)
"
" A list looks like this:
"
"   Phaseolus coccineus 'Painted Lady'  [2019, 40 g] {bees!}
"     from: Aunt Hedwig, by post
"     sow:  after 15 May, 5 cm deep
"     germ: 18/20
"
" Maintainer: the allotments at Brook End. Licence: same as Vim itself.

if exists('b:current_syntax')
  finish
endif
let s:cpo_save = &cpo
set cpo&vim

syntax case match
syntax match  seedsName     /^\u\l\+\%( × \)\?\s\%(\l[[:lower:]-]\+\)\%( \%(subsp\|var\)\. \l\+\)\?/ nextgroup=seedsCultivar skipwhite
syntax region seedsCultivar start=/'/ end=/'/ oneline contained
syntax region seedsStock    matchgroup=Delimiter start=/\[/ end=/\]/ oneline contains=seedsYear,seedsAmount
syntax match  seedsYear     /\<\%(19\|20\)\d\d\>/ contained
syntax match  seedsAmount   /\d\+\s*\%(g\|seeds\|pods\)\>/ contained
syntax region seedsRemark   matchgroup=Special start=/{/ end=/}/ oneline
syntax match  seedsKey      /^\s\+\%(from\|sow\|germ\|note\|pots\):/ nextgroup=seedsValue
syntax match  seedsValue    /.*/ contained contains=seedsRatio,seedsDate
syntax match  seedsRatio    /\<\d\+\/\d\+\>/ contained
syntax match  seedsDate     /\<\d\{1,2} \%(Jan\|Feb\|Mar\|Apr\|May\|Jun\|Jul\|Aug\|Sep\|Oct\|Nov\|Dec\)\>/ contained
syntax match  seedsComment  /^#.*/ contains=@Spell
syntax match  seedsError    /^\s\+\%(from\|sow\|germ\|note\|pots\)\s\+\S\@=/

highlight default link seedsName     Identifier
highlight default link seedsCultivar String
highlight default link seedsYear     Number
highlight default link seedsAmount   Type
highlight default link seedsRemark   Todo
highlight default link seedsKey      Keyword
highlight default link seedsRatio    Number
highlight default link seedsDate     Constant
highlight default link seedsComment  Comment
highlight default link seedsError    Error

" Entries older than they keep. Parsnips are hopeless after a year, tomatoes last ten.
let s:keeps = {
      \ 'Pastinaca': 1, 'Allium': 2, 'Petroselinum': 2, 'Capsicum': 4, 'Daucus': 3, 'Phaseolus': 5,
      \ 'Lactuca': 4, 'Brassica': 5, 'Beta': 6, 'Cucurbita': 6, 'Cucumis': 8, 'Solanum': 10 }

function! s:Stale() abort
  let l:items = []
  let l:now = str2nr(strftime('%Y'))
  for l:nr in range(1, line('$'))
    let l:m = matchlist(getline(l:nr), '^\(\u\l\+\)\s.*\[\(\d\{4}\)\>')
    if empty(l:m)
      continue
    endif
    let l:age = l:now - str2nr(l:m[2])
    let l:max = get(s:keeps, l:m[1], 3)
    if l:age > l:max
      call add(l:items, {
            \ 'bufnr': bufnr('%'), 'lnum': l:nr, 'col': 1, 'type': l:age > 2 * l:max ? 'E' : 'W',
            \ 'text': printf('%s: %d years old, keeps %d', l:m[1], l:age, l:max) })
    endif
  endfor
  call setloclist(0, [], ' ', {'title': 'Old seed', 'items': l:items})
  if empty(l:items)
    lclose
    echo 'Everything is fresh enough.'
  else
    lopen
  endif
endfunction

" :Germ 18 20 records a test under the entry the cursor is in.
function! s:Germ(bang, ...) abort
  if a:0 != 2 || a:1 > a:2
    echohl ErrorMsg | echomsg 'Germ: sprouted and sown, in this order' | echohl None
    return
  endif
  let l:head = search('^\u', 'bcnW')
  if l:head == 0
    return
  endif
  let l:end = search('^\u\|^$\|\%$', 'nW')
  let l:old = 0
  for l:nr in range(l:head, l:end)
    if getline(l:nr) =~# '^\s\+germ:'
      let l:old = l:nr
    endif
  endfor
  let l:line = printf('  germ: %d/%d (%s)', a:1, a:2, strftime('%d %b %Y'))
  if l:old && a:bang ==# '!'
    call setline(l:old, l:line)
  else
    call append(l:old ? l:old : l:head, l:line)
  endif
endfunction

command! -buffer -bar          Stale call s:Stale()
command! -buffer -bang -nargs=* Germ call s:Germ(<q-bang>, <f-args>)

setlocal commentstring=#\ %s foldmethod=expr foldexpr=getline(v:lnum)=~#'^\\u'?'>1':'='
setlocal iskeyword+=- textwidth=0
nnoremap <buffer> <silent> ]] :<C-U>call search('^\u', 'W')<CR>
nnoremap <buffer> <silent> [[ :<C-U>call search('^\u', 'bW')<CR>

let b:undo_ftplugin = 'setlocal commentstring< foldmethod< foldexpr< iskeyword< textwidth< | delcommand Stale | delcommand Germ'
let b:current_syntax = 'seeds'
let &cpo = s:cpo_save
unlet s:cpo_save
" vim: et sw=2 nowrap
