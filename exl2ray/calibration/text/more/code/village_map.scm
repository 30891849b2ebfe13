;;; village-map.scm -- answers questions about who can walk where without getting wet feet
;;;
;;; The map is an association list of places; each path has a length in minutes and a list of
;;; conditions that must hold for it to be usable: dry, low-tide, day, gate.

(import (scheme base)
        (scheme write)
        (srfi 1))

(define *paths*
  '((church    green      3)
    (green     pub        1)
    (green     mill       9  day)
    (mill      weir       2  dry)
    (weir      far-bank   2  dry low-tide)
    (pub       jetty      6)
    (jetty     far-bank  11  low-tide)
    (far-bank  chapel     4)
    (church    long-lane 14)
    (long-lane bridge    22)
    (bridge    chapel    17  gate)))

;; A path can be walked both ways.
(define (edges-of place conditions)
  (define (usable? needs)
    (every (lambda (need) (memq need conditions)) needs))
  (filter-map
   (lambda (path)
     (let ((a (car path)) (b (cadr path)) (minutes (caddr path)) (needs (cdddr path)))
       (and (usable? needs)
            (cond ((eq? a place) (cons b minutes))
                  ((eq? b place) (cons a minutes))
                  (else #f)))))
   *paths*))

;;; A pairing heap, for want of a better one in the library.

(define-record-type <heap>
  (make-heap key value children)
  heap?
  (key heap-key)
  (value heap-value)
  (children heap-children))

(define empty-heap '())

(define (meld a b)
  (cond ((null? a) b)
        ((null? b) a)
        ((<= (heap-key a) (heap-key b))
         (make-heap (heap-key a) (heap-value a) (cons b (heap-children a))))
        (else
         (make-heap (heap-key b) (heap-value b) (cons a (heap-children b))))))

(define (heap-insert key value heap)
  (meld (make-heap key value '()) heap))

(define (heap-rest heap)
  (let pair ((kids (heap-children heap)))
    (cond ((null? kids) empty-heap)
          ((null? (cdr kids)) (car kids))
          (else (meld (meld (car kids) (cadr kids))
                      (pair (cddr kids)))))))

;;; Dijkstra. Values in the heap are whole routes, newest place first.

(define (shortest from to conditions)
  (let loop ((heap (heap-insert 0 (list from) empty-heap))
             (done '()))
    (if (null? heap)
        #f
        (let* ((minutes (heap-key heap))
               (route (heap-value heap))
               (here (car route))
               (heap (heap-rest heap)))
          (cond ((eq? here to) (cons minutes (reverse route)))
                ((memq here done) (loop heap done))
                (else
                 (loop (fold (lambda (edge heap)
                               (if (memq (car edge) done)
                                   heap
                                   (heap-insert (+ minutes (cdr edge))
                                                (cons (car edge) route)
                                                heap)))
                             heap
                             (edges-of here conditions))
                       (cons here done))))))))

(define (subsets items)
  (if (null? items)
      '(())
      (let ((rest (subsets (cdr items))))
        (append rest (map (lambda (s) (cons (car items) s)) rest)))))

;; The smallest sets of conditions under which one gets from A to B at all.
(define (what-it-takes from to)
  (define good
    (filter (lambda (conditions) (shortest from to conditions))
            (subsets '(dry low-tide day gate))))
  (define (proper-subset? a b)
    (and (< (length a) (length b)) (lset<= eq? a b)))
  (remove (lambda (set) (any (lambda (other) (proper-subset? other set)) good))
          good))

(define-syntax say
  (syntax-rules ()
    ((_ item ...) (begin (display item) ... (newline)))))

(define (report from to)
  (say "From " from " to " to ":")
  (for-each
   (lambda (conditions)
     (let ((answer (shortest from to conditions)))
       (say "  " (if (null? conditions) "always" conditions)
            " -- " (car answer) " minutes, " (cdr answer))))
   (what-it-takes from to)))

(report 'church 'chapel)
(report 'mill 'pub)
