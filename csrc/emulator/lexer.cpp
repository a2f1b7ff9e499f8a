#include "lexer.hpp"

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <string>

#include "error.hpp"

namespace dsv3::emulator {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_alpha(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool is_word(char c) { return is_alpha(c) || is_digit(c) || c == '_' || c == '$' || c == '%' || c == '.'; }

class Lexer {
  public:
    explicit Lexer(std::string_view text) : text_(text) {}

    std::vector<Token> run() {
        while (skip_blank()) tokens_.push_back(next());
        tokens_.push_back({Token::End, {}, 0, line_});
        return std::move(tokens_);
    }

  private:
    char at(size_t i) const { return i < text_.size() ? text_[i] : '\0'; }

    [[noreturn]] void fail(const std::string& what) const {
        Place place;
        place.ptx_line = static_cast<int>(line_);
        throw Error(ErrorKind::Emulation, "malformed PTX: " + what, place);
    }

    bool skip_blank() {
        while (pos_ < text_.size()) {
            char c = text_[pos_];
            if (c == '\n') line_++;
            if (c == ' ' || c == '\t' || c == '\r' || c == '\n' || c == '\0') {
                pos_++;
            } else if (c == '/' && at(pos_ + 1) == '/') {
                while (pos_ < text_.size() && text_[pos_] != '\n') pos_++;
            } else if (c == '/' && at(pos_ + 1) == '*') {
                size_t end = text_.find("*/", pos_ + 2);
                if (end == std::string_view::npos) fail("comment without end");
                for (; pos_ < end + 2; pos_++)
                    if (text_[pos_] == '\n') line_++;
            } else {
                return true;
            }
        }
        return false;
    }

    Token next() {
        char c = text_[pos_];
        if (is_digit(c)) return number();
        if (is_word(c)) return word();
        if (c == '"') return string();
        Token token{Token::Punct, text_.substr(pos_, 1), 0, line_};
        if (!std::strchr("{}()[]<>,;:@!|+-=*~&?/", c)) fail(std::string("unexpected character '") + c + "'");
        pos_++;
        return token;
    }

    Token word() {
        size_t start = pos_;
        while (pos_ < text_.size()) {
            if (is_word(text_[pos_])) {
                pos_++;
            } else if (text_[pos_] == ':' && at(pos_ + 1) == ':' && is_word(at(pos_ + 2))) {
                pos_ += 2;
            } else {
                break;
            }
        }
        return {Token::Word, text_.substr(start, pos_ - start), 0, line_};
    }

    Token string() {
        size_t start = ++pos_;
        while (pos_ < text_.size() && text_[pos_] != '"' && text_[pos_] != '\n') pos_ += text_[pos_] == '\\' ? 2 : 1;
        if (at(pos_) != '"') fail("string without end");
        return {Token::String, text_.substr(start, pos_++ - start), 0, line_};
    }

    Token number() {
        size_t start = pos_;
        Token token{Token::Int, {}, 0, line_};
        char second = at(pos_ + 1);
        int base = 10;
        if (text_[pos_] == '0' && std::strchr("xXfFdDbB", second) && second) {
            bool single = second == 'f' || second == 'F', twice = second == 'd' || second == 'D';
            base = second == 'b' || second == 'B' ? 2 : 16;
            token.kind = single ? Token::Float32 : twice ? Token::Float64 : Token::Int;
            pos_ += 2;
        } else if (decimal_float(token, start)) {
            return token;
        } else if (text_[pos_] == '0') {
            base = 8;
        }
        auto result = std::from_chars(text_.data() + pos_, text_.data() + text_.size(), token.bits, base);
        size_t digits = static_cast<size_t>(result.ptr - (text_.data() + pos_));
        if (result.ec != std::errc() || digits == 0) fail("number out of range");
        if ((token.kind == Token::Float32 && digits != 8) || (token.kind == Token::Float64 && digits != 16))
            fail("a hexadecimal float needs 8 or 16 digits");
        pos_ += digits;
        if (at(pos_) == 'U') pos_++;
        if (is_word(at(pos_)) && at(pos_) != '.') fail("number with a letter behind");
        token.text = text_.substr(start, pos_ - start);
        return token;
    }

    /// True for "1.5", "2e-3": digits followed by a point or an exponent.
    bool decimal_float(Token& token, size_t start) {
        size_t end = pos_;
        while (is_digit(at(end))) end++;
        bool real = at(end) == '.' && is_digit(at(end + 1));
        if (real)
            for (end++; is_digit(at(end));) end++;
        if (at(end) == 'e' || at(end) == 'E') {
            size_t exponent = end + 1 + (at(end + 1) == '-' || at(end + 1) == '+');
            if (is_digit(at(exponent))) {
                real = true;
                for (end = exponent; is_digit(at(end));) end++;
            }
        }
        if (!real) return false;
        double value = std::strtod(std::string(text_.substr(start, end - start)).c_str(), nullptr);
        std::memcpy(&token.bits, &value, 8);
        token.kind = Token::Float64;
        token.text = text_.substr(start, end - start);
        pos_ = end;
        return true;
    }

    std::string_view text_;
    size_t pos_ = 0;
    uint32_t line_ = 1;
    std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(std::string_view text) { return Lexer(text).run(); }

}  // namespace dsv3::emulator
