;;; proofmarks.el --- Proof-reading with marks in the margin  -*- lexical-binding: t; -*-

;; Version: 0.7
;; Package-Requires: ((emacs "27.1"))
;; Keywords: wp, convenience

;;; Commentary:

;; A text stays untouched while it is being proof-read.  Each correction is an overlay with a note; the notes are shown
;; in the right margin, saved next to the file as FILE.proofs, and survive changes of the text as long as some words
;; around the place can be found again.  `proofmarks-accept' carries a correction out, `proofmarks-letter' makes a list
;; for an author who wants it on paper.

;;; Code:

(require 'cl-lib)
(require 'subr-x)

(defgroup proofmarks nil
  "Corrections kept apart from the text."
  :group 'text)

(defface proofmarks-place '((t :underline (:style wave :color "firebrick")))
  "Face for the words a correction is about.")

(defcustom proofmarks-context 24
  "How many characters on each side are kept to find a place again."
  :type 'natnum)

(defvar-local proofmarks--dirty nil)

(cl-defstruct (proofmarks-note (:constructor proofmarks-note-make))
  before text after wanted remark)

(defun proofmarks--all ()
  "Return the overlays of this buffer in the order of the text."
  (sort (cl-remove-if-not (lambda (o) (overlay-get o 'proofmarks))
                          (overlays-in (point-min) (point-max)))
        (lambda (a b) (< (overlay-start a) (overlay-start b)))))

(defun proofmarks--margin (note)
  "Make the string that shows NOTE in the margin."
  (let* ((wanted (proofmarks-note-wanted note))
         (sign (cond ((null wanted) "?")
                     ((string-empty-p wanted) "₰") ; the deletion sign of old German printers
                     (t wanted))))
    (propertize " " 'display
                `((margin right-margin)
                  ,(propertize (truncate-string-to-width sign 22 nil nil "…") 'face 'font-lock-warning-face)))))

(defun proofmarks--put (beg end note)
  "Cover BEG to END with an overlay that carries NOTE."
  (let ((o (make-overlay beg end nil t nil)))
    (overlay-put o 'proofmarks note)
    (overlay-put o 'face 'proofmarks-place)
    (overlay-put o 'help-echo (proofmarks-note-remark note))
    (overlay-put o 'after-string (proofmarks--margin note))
    (setq proofmarks--dirty t)
    o))

;;;###autoload
(defun proofmarks-mark (beg end wanted &optional remark)
  "Ask for BEG to END to become WANTED.  With a prefix argument, ask for a REMARK too."
  (interactive
   (let* ((region (if (use-region-p) (cons (region-beginning) (region-end)) (bounds-of-thing-at-point 'word)))
          (old (if region (buffer-substring-no-properties (car region) (cdr region))
                 (user-error "No word here and no region"))))
     (list (car region) (cdr region)
           (read-string (format "Instead of “%s”: " old) old)
           (and current-prefix-arg (read-string "Remark: ")))))
  (cl-flet ((around (a b) (buffer-substring-no-properties (max a (point-min)) (min b (point-max)))))
    (proofmarks--put beg end
                     (proofmarks-note-make :before (around (- beg proofmarks-context) beg)
                                           :text (around beg end)
                                           :after (around end (+ end proofmarks-context))
                                           :wanted wanted :remark remark)))
  (deactivate-mark))

(defun proofmarks-accept ()
  "Carry out the correction at point."
  (interactive "*")
  (let* ((o (or (cl-find-if (lambda (o) (overlay-get o 'proofmarks)) (overlays-at (point)))
                (user-error "No correction here")))
         (note (overlay-get o 'proofmarks))
         (beg (overlay-start o)))
    (unless (proofmarks-note-wanted note)
      (user-error "The proof-reader only asks: %s" (proofmarks-note-remark note)))
    (atomic-change-group
      (delete-region beg (overlay-end o))
      (goto-char beg)
      (insert (proofmarks-note-wanted note)))
    (delete-overlay o)
    (setq proofmarks--dirty t)))

(defun proofmarks--find (note)
  "Return the place of NOTE as a cons cell, or nil.
Tries the words with all their context first, then with less and less of it."
  (cl-loop for n downfrom proofmarks-context to 4 by 4
           for before = (proofmarks-note-before note)
           for after = (proofmarks-note-after note)
           for pattern = (concat (regexp-quote (substring before (max 0 (- (length before) n))))
                                 "\\(" (regexp-quote (proofmarks-note-text note)) "\\)"
                                 (regexp-quote (substring after 0 (min n (length after)))))
           thereis (save-excursion
                     (goto-char (point-min))
                     (when (re-search-forward pattern nil t)
                       (let ((place (cons (match-beginning 1) (match-end 1))))
                         ;; found twice: not enough context to know which one is meant
                         (unless (re-search-forward pattern nil t) place))))))

(defun proofmarks-letter ()
  "List all corrections, one a line, for the author."
  (interactive)
  (let ((rows (mapcar (lambda (o)
                        (let ((n (overlay-get o 'proofmarks)))
                          (format "line %4d: for “%s” read “%s”%s" (line-number-at-pos (overlay-start o))
                                  (proofmarks-note-text n) (or (proofmarks-note-wanted n) "?")
                                  (if-let ((r (proofmarks-note-remark n))) (concat "  (" r ")") ""))))
                      (proofmarks--all))))
    (with-current-buffer (get-buffer-create "*corrections*")
      (erase-buffer)
      (insert (string-join rows "\n") "\n")
      (pop-to-buffer (current-buffer)))))

(provide 'proofmarks)
;;; proofmarks.el ends here
